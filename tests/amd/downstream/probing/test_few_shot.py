from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from amd.config import ConfigError
from amd.downstream.arrays import Features
from amd.downstream.probing.few_shot import check_enough, draw_samples, few_shot
from tests.amd.downstream.probing.test_classifiers import clouds


@given(st.integers(1, 5), st.integers(0, 1000))
def test_a_draw_contains_the_same_number_of_distinct_samples_from_every_class(labels: int, seed: int) -> None:
    train = np.random.default_rng(seed).permutation(np.repeat([0, 3, 7], [5, 9, 20]))
    drawn = draw_samples(train, labels, np.random.default_rng(seed))
    assert len(set(drawn.tolist())) == 3 * labels
    assert sorted(train[drawn].tolist()) == sorted([0, 3, 7] * labels)


def test_samples_within_a_class_are_drawn_uniformly() -> None:
    train = np.repeat([0, 1], [4, 2])
    counts = np.zeros(6)
    for seed in range(3000):
        counts[draw_samples(train, 1, np.random.default_rng(seed))] += 1
    np.testing.assert_allclose(counts / 3000, [1 / 4] * 4 + [1 / 2] * 2, atol=0.03)


def test_mean_and_standard_deviation_across_draws_match_scikit_learn_logistic_regression() -> None:
    train, test = clouds(1, 200), clouds(2, 100)
    scores = []
    for draw in range(3):
        drawn = draw_samples(train.labels, 5, np.random.default_rng([4, 5, draw]))
        peer = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=300))
        peer.fit(train.values[drawn], train.labels[drawn])
        scores.append(100 * peer.score(test.values, test.labels))
    found = few_shot(train, test, labels=5, draws=3, seed=4)
    assert found.mean == pytest.approx(np.mean(scores))
    assert found.std == pytest.approx(np.std(scores))
    assert found.std > 0


def test_accuracy_increases_with_more_labels() -> None:
    train, test = clouds(1, 400, spread=1.5), clouds(2, 400, spread=1.5)
    one, many = (few_shot(train, test, labels=labels, draws=5, seed=0) for labels in (1, 20))
    assert many.mean > one.mean + 10


def test_scores_depend_on_the_seed_and_are_reproducible() -> None:
    train, test = clouds(1, 400, spread=1.5), clouds(2, 400, spread=1.5)
    one = few_shot(train, test, labels=1, draws=5, seed=0)
    assert few_shot(train, test, labels=1, draws=5, seed=0) == one
    assert few_shot(train, test, labels=1, draws=5, seed=1) != one


def test_a_class_with_too_few_samples_is_reported() -> None:
    labels = np.repeat([0, 1, 2], [10, 4, 12])
    check_enough(labels, (1, 4), "data.train=x")
    with pytest.raises(ConfigError, match=r"few_shot.labels=\[1, 5\].*data.train=x class 1 has 4; lower few_shot"):
        check_enough(labels, (1, 5), "data.train=x")
    with pytest.raises(ConfigError, match=r"class 1 \(cat\) has 4"):
        check_enough(labels, (5,), "data.train=x", ("ape", "cat", "dog"))


def test_draws_that_contain_all_samples_have_zero_standard_deviation() -> None:
    train, test = clouds(1, 80), clouds(2, 50)
    order = np.argsort(train.labels, kind="stable")
    count = int(np.bincount(train.labels).min())
    equal = np.concatenate([order[train.labels[order] == c][:count] for c in range(4)])
    balanced = Features(train.values[equal], train.labels[equal])
    assert few_shot(balanced, test, labels=count, draws=3, seed=0).std == pytest.approx(0, abs=1e-9)
