"""Tests for the chaos campaign: the kill plan, and a short campaign."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.chaos.campaign import plan, run_campaign
from tests.support.chaos.victims import ROLES

KILLS, SEED = 12, 0


def test_a_plan_depends_only_on_its_seed_and_contains_each_role_once_per_round() -> None:
    planned = plan(3 * len(ROLES), 7, ROLES)
    assert planned == plan(3 * len(ROLES), 7, ROLES)
    assert planned != plan(3 * len(ROLES), 8, ROLES)
    assert planned[:KILLS] == plan(KILLS, 7, ROLES)
    for start in range(0, len(planned), len(ROLES)):
        assert {kill.role for kill in planned[start : start + len(ROLES)]} == set(ROLES)
    assert planned[0].after_recovery
    assert any(not kill.after_recovery for kill in planned)


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(5400)
def test_identical_jobs_train_identical_weights_despite_random_kills() -> None:
    with tempfile.TemporaryDirectory(prefix="amd-chaos-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        campaign = run_campaign(Path(folder), plan(KILLS, SEED, ROLES))
        report = "\n".join(campaign.report())
    print(report)
    assert not campaign.violations, report
    assert len(campaign.observed) == KILLS
