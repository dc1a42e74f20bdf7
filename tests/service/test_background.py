"""Tests that background loops report whether they complete their steps, and that `/readyz` includes the reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from service.app import create_app
from service.background import LATE_S, STALLED_S, StepMonitor
from service.settings import Settings
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.webhooks import SettableClock


def test_a_loop_is_ok_until_a_step_takes_too_long_or_fails(clock: SettableClock) -> None:
    monitor = StepMonitor("reconciler", clock)
    assert monitor.report() == "ok"
    with monitor.step():
        clock.now += LATE_S + 1
        assert monitor.report() == "has not completed a step for 61 s"
    assert (monitor.report(), monitor.age_s) == ("ok", 0.0)
    with pytest.raises(ValueError, match="bad"), monitor.step():
        raise ValueError("bad\nvalue")
    assert monitor.report() == "its last step failed: ValueError: bad"
    assert not monitor.is_stalled
    clock.now += STALLED_S + 1
    assert monitor.is_stalled


def test_readiness_reports_loops_but_depends_only_on_the_database(
    sqlite_engine: Engine, tmp_path: Path, clock: SettableClock
) -> None:
    app = create_app(Settings(data_dir=tmp_path, storage=str(tmp_path)), engine=sqlite_engine, cluster=FakeCluster())
    app.state.monitors.append(StepMonitor("deployer", clock))
    with TestClient(app) as client:
        assert client.get("/readyz").json()["parts"]["deployer"] == "ok"
        clock.now += 100
        response = client.get("/readyz")
    assert response.status_code == 200
    assert response.json()["parts"]["deployer"] == "has not completed a step for 100 s"
