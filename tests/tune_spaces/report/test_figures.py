"""Tests for report statistics: paired intervals, comparable trials and the Pareto front."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd.storage import read_json
from tests.support.runs.ledgers import masking_sweep, ratios, rung, search, trial, write_sweep
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import TrialRecord
from tune_spaces.report import write_report
from tune_spaces.report.figures import by_layers, difference, importance, pareto_front, speed_front, trial_rows
from tune_spaces.report.formatting import share, short, signed, spread
from tune_spaces.report.ratio_map import bins, ratio_map
from tune_spaces.report.sweep import SweepHistory, read_sweep
from tune_spaces.report.verdict import compare_with_baseline, verdict


def sweep(config: SearchConfig, records: Sequence[TrialRecord]) -> SweepHistory:
    return read_sweep(write_sweep(f"memory://{uuid.uuid4().hex}", config, records))


def ended(number: int, scores: Sequence[float], **fields: Any) -> TrialRecord:
    return trial(number, ratios(0.75, round(0.05 * number, 2)), [rung(1.0, scores)], **fields)


def pair(ours: Sequence[float], theirs: Sequence[float]) -> SweepHistory:
    config = search(seeds=len(theirs), rungs=1, stopping="none")
    return sweep(config, [ended(0, theirs, baseline=True), ended(1, ours)])


def test_the_interval_is_a_t_interval_of_differences_paired_by_seed() -> None:
    # differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138
    found = difference([81.0, 83.0, 85.0], [80.0, 81.0, 82.0])
    assert found.value == pytest.approx(2.0)
    assert found.interval == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    # differences 1, 2: mean 1.5, sd sqrt(0.5), t(0.975, 1) = 12.706205, half width 12.706205 * 0.5
    assert difference([81.0, 83.0], [80.0, 81.0]).interval == pytest.approx((1.5 - 6.353102, 1.5 + 6.353102), abs=1e-5)


def test_there_is_no_interval_for_one_seed_or_unequal_numbers_of_seeds() -> None:
    assert difference([81.0], [80.0]) == (1.0, None)
    assert difference([81.0, 83.0], [80.0, 81.0, 82.0]).interval is None


def test_the_verdict_claims_a_difference_only_if_the_interval_excludes_zero() -> None:
    alike = pair([81.0, 83.0, 85.0], [80.0, 81.0, 82.0])
    assert compare_with_baseline(alike, alike.trials[1]) == "not_significant"
    assert "+2.0 points, 95 % interval -0.5 to +4.5 (paired by seed): not a significant difference" in verdict(alike)
    better = pair([82.0, 83.1, 83.9], [80.0, 81.0, 82.0])
    assert compare_with_baseline(better, better.trials[1]) == "better"
    assert "+2.0 points, 95 % interval +1.8 to +2.2 (paired by seed): a significant difference" in verdict(better)
    assert "The best of 2 is selected by its own score, which is thus biased upwards" in verdict(better)


def test_a_significant_difference_becomes_uncertain_after_many_comparisons() -> None:
    # differences 1.5, 2, 2.5: half width 1.242 for one comparison; for 9, t(1 - 0.05/18, 2) = 13.4, half width 3.9
    config = search(seeds=3, rungs=1, stopping="none")
    others = [ended(number, [70.0, 71.0, 72.0]) for number in range(2, 10)]
    many = sweep(config, [ended(0, [80.0, 81.0, 82.0], baseline=True), ended(1, [81.5, 83.0, 84.5]), *others])
    assert compare_with_baseline(many, many.trials[1]) == "uncertain"
    assert "not after correction for 9 comparisons" in verdict(many)


def test_the_verdict_on_a_single_seed_suggests_more_seeds() -> None:
    one = pair([81.0], [80.0])
    assert compare_with_baseline(one, one.trials[1]) == "unknown"
    assert "one seed, so no interval; repeat with seeds=3" in verdict(one)


def test_the_runner_up_is_reported_if_the_baseline_is_best() -> None:
    found = verdict(pair([80.0, 81.0, 82.0], [82.0, 83.1, 83.9]))
    assert "It is the baseline" in found
    assert "is 2.0 points behind, 95 % interval +1.8 to +2.2" in found


def test_differences_use_the_highest_rung_that_both_trials_reached() -> None:
    records = [
        trial(0, ratios(0.75, 0.5), [rung(1 / 9, [60.0, 61.0])], "stopped", baseline=True),
        trial(1, ratios(0.75, 0.25), [rung(1 / 9, [62.0, 64.0]), rung(1 / 3, [70.0, 71.0]), rung(1.0, [80.0, 81.0])]),
    ]
    best = trial_rows(sweep(search(seeds=2), records))[0]
    assert (best.number, best.rung, best.difference_rung) == (1, 3, 1)
    assert best.difference == pytest.approx(2.5)


def test_rungs_are_recognised_despite_rounded_steps() -> None:
    found = sweep(search(seeds=1), [trial(0, {}, [rung(55 / 500, [60.0]), rung(167 / 500, [61.0]), rung(1.0, [62.0])])])
    assert sorted(found.trials[0].rungs) == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30))
def test_the_pareto_front_contains_exactly_the_non_dominated_trials(points: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    on = set(pareto_front(points))
    assert on
    for at, point in enumerate(points):
        assert any(beats(points[other], point) for other in on) == (at not in on)


def test_the_pareto_front_of_a_sweep_contains_only_comparable_trials() -> None:
    records = [
        trial(0, ratios(0.75, 0.5), [rung(1.0, [80.0], seconds=10)]),
        trial(1, ratios(0.75, 0.25), [rung(1.0, [79.0], seconds=5)]),
        trial(2, ratios(0.75, 0.0), [rung(1.0, [78.0], seconds=8)]),
        trial(3, ratios(0.9, 0.0), [rung(1 / 3, [99.0], seconds=1)], "stopped"),
    ]
    assert [found.number for found in speed_front(sweep(search(seeds=1), records))] == [0, 1]


def test_map_cells_contain_the_mean_the_deviation_and_the_highest_rung() -> None:
    config = search(seeds=2, rungs=2, stopping="none")
    records = [
        trial(0, {"a": 0}, [rung(1 / 3, [60.0, 62.0]), rung(1.0, [80.0, 82.0])], overrides={}, baseline=True),
        trial(1, {"a": 1}, [rung(1 / 3, [61.0, 63.0]), rung(1.0, [84.0, 84.0])], overrides={}),
        trial(2, {"a": 2}, [rung(1 / 3, [50.0, 54.0])], "stopped", overrides={}),
        trial(3, ratios(0.9, 0.9), [rung(1 / 3, [40.0, 42.0])], "stopped"),
        trial(4, ratios(0.9, 0.0), [rung(1.0, [1.0, 1.0])], "failed"),
    ]
    found = ratio_map(sweep(config, records), 1)
    assert found is not None
    assert (found.students, found.teachers) == (["0.75", "0.9"], ["0.5", "0.9"])
    base, symmetric = found.cells
    # trials 0 and 1 at the end; trial 2 stopped earlier. sds are sqrt(2) and 0: pooled sqrt((2 + 0) / 2) = 1
    assert (base.student, base.teacher, base.level, base.trials, base.symmetric) == (0, 0, 1, (0, 1), False)
    assert base.score == pytest.approx(82.5)
    assert base.sd == pytest.approx(1.0)
    assert (symmetric.student, symmetric.teacher, symmetric.level, symmetric.symmetric) == (1, 1, 0, True)
    assert (0, 1) not in found.possible  # the teacher would see less than the student
    earlier = ratio_map(sweep(config, records), 0)
    assert earlier is not None
    assert earlier.cells[0].score == pytest.approx((61 + 62 + 52) / 3)


def test_there_is_no_ratio_map_if_the_ratios_do_not_vary() -> None:
    assert ratio_map(pair([81.0], [80.0]), 0) is not None
    same = sweep(search(seeds=1), [trial(number, {}, [rung(1.0, [80.0])], overrides={}) for number in range(3)])
    assert ratio_map(same, 2) is None


@given(st.lists(st.floats(0, 0.99), min_size=1, max_size=60))
def test_bins_preserve_the_order_of_values_and_zero_has_its_own_bin(values: list[float]) -> None:
    labels, places = bins(values)
    assert set(places) == set(values)
    assert [places[value] for value in sorted(values)] == sorted(places[value] for value in values)
    assert set(places.values()) == set(range(len(labels)))
    if 0 in places:
        assert [value for value in places if places[value] == places[0]] == [0]


def test_layer_pairs_are_ranked_only_if_they_vary() -> None:
    last = [{"student": 4, "teacher": 6}]
    records = [
        ended(0, [80.0], baseline=True),
        trial(1, {"alignment.layers": "last"}, [rung(1.0, [82.0])], overrides={"objective.layers": last}),
        trial(2, {"alignment.layers": "last"}, [rung(1.0, [83.0])], overrides={"objective.layers": last}),
    ]
    found = by_layers(sweep(search(seeds=1), records))
    assert [(group.label, group.score(2)) for group in found] == [("4→6", 82.5), ("2→3 4→6", 80.0)]
    assert by_layers(pair([81.0], [80.0])) == []


def test_importance_identifies_the_dimension_that_determines_the_score() -> None:
    records = [
        trial(number, {"x": x, "y": y}, [rung(1.0, [70.0 + 10 * x + 0.1 * (y == "b")])], overrides={})
        for number, (x, y) in enumerate((x / 4, y) for x in range(5) for y in ("a", "b"))
    ]
    found = importance(sweep(search(seeds=1), records))
    assert found is not None
    assert found.trials == 10
    assert list(found.shares) == ["x", "y"]
    assert found.shares["x"] > 0.9
    assert sum(found.shares.values()) == pytest.approx(1.0)
    folder = write_sweep(f"memory://{uuid.uuid4().hex}", search(seeds=1), records)
    assert write_report(folder).importance == found
    assert read_json(f"{folder}/report/report.json")["importance"] == found.model_dump()


def test_importance_requires_several_trials_dimensions_and_scores() -> None:
    few = [
        trial(number, {"x": number, "y": -number}, [rung(1.0, [70.0 + number])], overrides={}) for number in range(3)
    ]
    assert importance(sweep(search(seeds=1), few)) is None
    one = [trial(number, {"x": number, "y": 1}, [rung(1.0, [70.0 + number])], overrides={}) for number in range(6)]
    assert importance(sweep(search(seeds=1), one)) is None
    same = [trial(number, {"x": number, "y": -number}, [rung(1.0, [70.0])], overrides={}) for number in range(6)]
    assert importance(sweep(search(seeds=1), same)) is None


def test_importance_uses_the_rung_with_the_most_comparable_trials() -> None:
    found = importance(sweep(search(), masking_sweep(search(), 12)))
    assert found is not None
    assert (found.level, found.trials) == (0, 12)


def test_values_are_formatted_compactly() -> None:
    assert short([{"student": 2, "teacher": 3}, {"student": 4, "teacher": 6}]) == "2→3 4→6"
    assert [short(value) for value in (True, None, 0.00150001, "tube")] == ["yes", "none", "0.0015", "tube"]
    assert [share(value) for value in (1 / 9, 1 / 3, 1.0, 0.123456)] == ["1/9", "1/3", "1", "12 %"]
    assert [signed(value) for value in (-0.01, 0.04, -1.25, 2.0)] == ["0.0", "0.0", "-1.2", "+2.0"]
    assert [spread(value) for value in ((), (80.0,), (80.0, 82.0))] == ["–", "80.0", "81.0 ± 1.4"]
