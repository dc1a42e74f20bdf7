from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from amd.downstream.supervised.classification import metrics
from amd.downstream.supervised.classification.metrics import MergedViews


def arrays(rows: list[dict[str, Any]]) -> tuple[Any, Any, Any]:
    """Return records, views and logits from the rows of the official output."""
    records = np.array([int(row["id"].removeprefix("vid")) for row in rows], np.int64)
    views = np.array([3 * row["chunk"] + row["split"] for row in rows], np.int64)
    return records, views, np.array([row["logits"] for row in rows])


@pytest.fixture(scope="module")
def case(golden: Path) -> dict[str, Any]:
    return dict(json.loads((golden / "multiview_merge.json").read_text()))


def test_merging_matches_the_official_code_and_counts_padded_rows_once(case: dict[str, Any]) -> None:
    rows = [row for rank in case["ranks"] for row in rank]
    merged = metrics.merge(*arrays(rows))
    assert len(rows) == 50, "two rows are duplicates"
    assert merged.views.tolist() == [6] * 8
    official = [case["per_video"][f"vid{record}"] for record in merged.records]
    assert merged.probabilities == pytest.approx(np.array([video["prob"] for video in official]), abs=1e-12)
    assert merged.probabilities.argmax(axis=1).tolist() == [video["pred"] for video in official]
    labels = np.array([video["label"] for video in official])
    figures = metrics.single_label(merged.probabilities, labels, len(labels))
    assert figures == {"eval/top1": case["top1"], "eval/top5": case["top5"]}


def test_merging_rank_by_rank_returns_the_same_result(case: dict[str, Any]) -> None:
    records, views, logits = arrays([row for rank in case["ranks"] for row in rank])
    whole = metrics.merge(records, views, logits)
    parts = [metrics.merge(records[own], views[own], logits[own]) for own in (records % 3 == r for r in range(3))]
    joined = metrics.join([*parts, parts[0]])  # the samples of one rank are duplicates
    for ours, theirs in zip(joined, whole, strict=True):
        assert np.array_equal(ours, theirs)


def test_views_are_averaged_as_probabilities_not_as_logits() -> None:
    a, b = np.array([4.0, 0.0]), np.array([-1.0, 0.0])
    merged = metrics.merge(np.zeros(2, np.int64), np.arange(2), np.stack([a, b]))
    softmax = [1 / (1 + math.exp(-4)), 1 / (1 + math.exp(1))]
    assert merged.probabilities[0, 0] == pytest.approx(sum(softmax) / 2)
    assert merged.probabilities[0, 0] != pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.05)


def test_probabilities_of_huge_logits_are_finite() -> None:
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert metrics.probabilities(logits).tolist() == [[1, 0, 0]]
        assert metrics.probabilities(logits, multi_label=True).tolist() == [[1, 0, 0.5]]


def test_merging_no_views_returns_no_samples() -> None:
    none = np.zeros(0, np.int64)
    merged = metrics.merge(none, none, np.zeros((0, 3), np.float32))
    assert merged.probabilities.shape == (0, 3)
    assert metrics.single_label(merged.probabilities, none, 4) == {"eval/top1": 0, "eval/top5": 0}


def test_an_unreadable_sample_counts_as_wrong() -> None:
    scored, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])
    assert metrics.single_label(scored, labels, total=4) == {"eval/top1": 50, "eval/top5": 50}


def test_mean_average_precision_matches_a_manual_calculation() -> None:
    truth = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    scored = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.7, 0.6, 0.5], [0.1, 0.8, 0.5]])
    # Class 0: correct at ranks 1 and 3, (1/1 + 2/3) / 2. Class 1: ranks 2 and 3, (1/2 + 2/3) / 2. Class 2: no sample.
    by_hand = 100 * ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert metrics.multi_label(scored, truth)["eval/map"] == pytest.approx(by_hand)


def test_cross_entropy_is_the_mean_negative_log_probability() -> None:
    scored = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert metrics.cross_entropy(scored, np.array([0, 0])) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_confusion_and_class_report_match_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.arange(4), rng.integers(0, 4, 60)])
    predicted = np.where(rng.random(64) < 0.6, labels, rng.integers(0, 4, 64))
    matrix = metrics.confusion(predicted, labels, 4)
    assert np.array_equal(matrix, confusion_matrix(labels, predicted))
    precision, recall, _, samples = precision_recall_fscore_support(labels, predicted)
    rows = metrics.class_report(matrix, ("a", "b", "c", "d"))
    assert [row["name"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["samples"] for row in rows] == samples.tolist()
    assert [row["recall"] for row in rows] == pytest.approx((100 * recall).tolist())
    assert [row["precision"] for row in rows] == pytest.approx((100 * precision).tolist())


def test_recall_is_undefined_for_a_class_that_never_occurs() -> None:
    (_, absent) = metrics.class_report(metrics.confusion(np.array([0]), np.array([0]), 2), None)
    assert (absent["name"], absent["samples"]) == ("1", 0)
    assert math.isnan(float(absent["recall"]))
    assert math.isnan(float(absent["precision"]))


def test_merged_rows_are_sorted_by_record() -> None:
    one = MergedViews(np.array([5, 9]), np.array([[0.1], [0.2]]), np.array([1, 1]))
    other = MergedViews(np.array([2, 7]), np.array([[0.3], [0.4]]), np.array([1, 1]))
    joined = metrics.join([one, other])
    assert joined.records.tolist() == [2, 5, 7, 9]
    assert joined.probabilities[:, 0].tolist() == [0.3, 0.1, 0.4, 0.2]
