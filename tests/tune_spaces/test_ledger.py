"""Tests for the IDs of trials' runs."""

from __future__ import annotations

import pytest

from tune_spaces.ledger import sweep_of, trial_run_id


@pytest.mark.parametrize("sweep", ["search-20260101-000000-0000abcd", "ratios-0001-s2"])
@pytest.mark.parametrize("number", [0, 12_345])
def test_the_sweep_of_a_trials_run_is_found_by_the_runs_id(sweep: str, number: int) -> None:
    assert sweep_of(trial_run_id(sweep, number, seed=3)) == sweep


@pytest.mark.parametrize("run_id", ["search-20260101-000000-0000abcd", "ratios-12-s0", "teacher-0123abcd"])
def test_a_run_that_is_not_a_trial_has_no_sweep(run_id: str) -> None:
    assert sweep_of(run_id) is None
