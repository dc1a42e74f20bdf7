"""Tests for early stopping: decisions match manual calculations and are the same after a restart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tests.support.runs import ledgers
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger
from tune_spaces.search.asha import SuccessiveHalving, make_scheduler

METRIC = ledgers.METRIC
GO, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP
RungReport = tuple[int, int, float]  # number, level, score


def trial(number: int) -> Any:
    """Return a trial as created by Tune. Its ID changes after a restart."""
    return SimpleNamespace(trial_id=f"{id(object())}-{number}", config={"number": number})


def decide(made: TrialScheduler, report: RungReport) -> str:
    number, level, score = report
    return str(made.on_trial_result(None, trial(number), {"level": level, METRIC: score}))


def new_scheduler(config: SearchConfig, trials: int) -> TrialScheduler:
    made = SuccessiveHalving(config)
    for number in range(trials):
        made.on_trial_add(None, trial(number))
    return made


def rebuild(config: SearchConfig, reports: list[RungReport], folder: Path) -> TrialScheduler:
    """Return the scheduler after a restart, rebuilt from the ledger before Tune adds trials."""
    ledger = Ledger(str(folder))
    for at, (number, level, score) in enumerate(reports):
        rung = ledgers.rung(config.fractions()[level], [score]).model_copy(update={"time": 100.0 + at})
        record = ledger.records.get(number) or ledgers.trial(number, {}, [], "running")
        ledger.records[number] = record.model_copy(update={"rungs": (*record.rungs, rung)})
    return make_scheduler(config, ledger)


def test_halving_decisions_match_a_manual_calculation() -> None:
    """Half of the trials continue: a trial below the median of earlier trials at its rung stops; a tie continues."""
    made = new_scheduler(ledgers.search(rungs=3, reduction=2), 6)
    steps = [
        ((0, 0, 50.0), GO),  # the first at this rung
        ((1, 0, 40.0), STOP),  # below 50
        ((2, 0, 45.0), GO),  # the median of 40, 50
        ((3, 0, 44.0), STOP),  # below 45, the median of 40, 45, 50
        ((0, 1, 60.0), GO),  # the first at the second rung
        ((2, 1, 70.0), GO),
        ((4, 0, 44.5), GO),  # the median of 40, 44, 45, 50
        ((4, 1, 64.0), STOP),  # below 65
        ((0, 2, 80.0), GO),
        ((5, 0, 90.0), GO),
        ((5, 1, 59.0), STOP),  # the best trial at one rung need not be best at the next
    ]
    assert [(report, decide(made, report)) for report, _ in steps] == steps


def test_the_best_third_continues() -> None:
    made = new_scheduler(ledgers.search(rungs=2, reduction=3), 9)
    for number, score in enumerate([10.0, 20.0, 30.0, 40.0]):
        assert decide(made, (number, 0, score)) == GO
    # the 2/3 quantile of 10, 20, 30, 40 is 30
    assert decide(made, (4, 0, 29.9)) == STOP
    assert decide(made, (5, 0, 35.0)) == GO


SCORES = st.integers(0, 20).map(float)


@st.composite
def report_sequences(draw: st.DrawFn, trials: int = 8, rungs: int = 3) -> list[RungReport]:
    """Generate reported rungs, in order within a trial and interleaved across trials."""
    order = draw(st.permutations([number for number in range(trials) for _ in range(rungs)]))
    reached = dict.fromkeys(range(trials), -1)
    reports = []
    for number in order:
        reached[number] += 1
        reports.append((number, reached[number], draw(SCORES)))
    return reports


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reports=report_sequences(),
    cut=st.integers(0, 24),
    stopping=st.sampled_from(["asha", "hyperband"]),
    reduction=st.integers(2, 5),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_scheduler_rebuilt_from_the_ledger_makes_the_same_decisions(
    tmp_path: Path, reports: list[RungReport], cut: int, stopping: str, reduction: int, seed: int
) -> None:
    config = ledgers.search(stopping=stopping, rungs=3, reduction=reduction, seed=seed, seeds=1)
    uninterrupted = new_scheduler(config, 8)
    for report in reports[:cut]:
        decide(uninterrupted, report)
    rebuilt = rebuild(config, reports[:cut], tmp_path)
    for number in reversed(range(8)):
        rebuilt.on_trial_add(None, trial(number))
    assert [decide(rebuilt, report) for report in reports[cut:]] == [
        decide(uninterrupted, report) for report in reports[cut:]
    ]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reports=report_sequences(trials=5), cut=st.integers(1, 14), stopping=st.sampled_from(["asha", "hyperband"]))
def test_reported_rungs_are_not_evaluated_again(
    tmp_path: Path, reports: list[RungReport], cut: int, stopping: str
) -> None:
    config = ledgers.search(stopping=stopping, rungs=3, reduction=3, seeds=1)
    once, again = new_scheduler(config, 5), new_scheduler(config, 5)
    for report in reports[:cut]:
        decide(once, report)
        decide(again, report)
    assert {decide(again, (number, level, -1.0)) for number, level, _ in reports[:cut]} == {GO}
    assert [decide(again, report) for report in reports[cut:]] == [decide(once, report) for report in reports[cut:]]
    rebuilt = rebuild(config, reports[:cut], tmp_path)
    for number in range(5):
        rebuilt.on_trial_add(None, trial(number))
    assert {decide(rebuilt, report) for report in reports[:cut]} == {GO}


@given(number=st.integers(0, 5000), seed=st.integers(0, 2**31 - 1), noise=st.integers(0, 1000))
def test_a_trials_bracket_does_not_depend_on_when_the_trial_is_added(number: int, seed: int, noise: int) -> None:
    config = ledgers.search(stopping="hyperband", seed=seed)
    one, other = SuccessiveHalving(config), SuccessiveHalving(config)
    other.on_trial_add(None, trial(number + 1))
    np.random.seed(noise)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    for made in (one, other):
        made.on_trial_add(None, trial(number))
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]
    places = [made._brackets.index(made._trial_info[str(number)]) for made in (one, other)]
    assert places[0] == places[1]


def test_hyperband_has_a_bracket_for_every_rung_and_asha_only_for_the_first() -> None:
    for stopping, judged_at in (("asha", {0}), ("hyperband", {0, 1, 2})):
        made = SuccessiveHalving(ledgers.search(stopping=stopping, rungs=3, reduction=3))
        for number in range(60):
            made.on_trial_add(None, trial(number))
        assert {made._brackets.index(made._trial_info[str(number)]) for number in range(60)} == judged_at
        assert [len(bracket._rungs) for bracket in made._brackets] == ([3] if stopping == "asha" else [3, 2, 1])


@pytest.mark.parametrize("reduction", range(2, 11))
@pytest.mark.parametrize("rungs", range(1, 11))
def test_the_number_of_rungs_matches_the_config(rungs: int, reduction: int) -> None:
    (bracket,) = SuccessiveHalving(ledgers.search(rungs=rungs, reduction=reduction))._brackets
    assert len(bracket._rungs) == rungs


def test_trials_are_ranked_separately_at_each_rung() -> None:
    made = new_scheduler(ledgers.search(rungs=10, reduction=10), 3)
    for level in range(10):
        assert decide(made, (0, level, 50.0)) == GO
        assert decide(made, (1, level, 60.0)) == GO
        assert decide(made, (2, level, 10.0)) == STOP


@given(reports=report_sequences(trials=4))
def test_every_trial_continues_if_early_stopping_is_disabled(reports: list[RungReport]) -> None:
    made = make_scheduler(ledgers.search(stopping="none"), Ledger("memory://no-such-sweep"))
    assert type(made) is FIFOScheduler
    assert {decide(made, report) for report in reports} == {GO}


def test_a_failed_trial_is_ignored_by_the_scheduler() -> None:
    made = new_scheduler(ledgers.search(rungs=2, reduction=2), 3)
    assert decide(made, (0, 0, 50.0)) == GO
    assert made.on_trial_result(None, trial(1), {"failed": "diverged", "message": "loss is nan"}) == GO
    made.on_trial_complete(None, trial(1), {"failed": "diverged", "message": "loss is nan"})
    made.on_trial_remove(None, trial(1))
    assert decide(made, (2, 0, 49.0)) == STOP
    assert decide(made, (1, 0, 51.0)) == GO


def test_tune_may_pass_metric_and_mode_again() -> None:
    assert SuccessiveHalving(ledgers.search()).set_search_properties(METRIC, "max")
