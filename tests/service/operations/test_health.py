"""Tests that concurrent health probes from orchestrators and load balancers all get a response."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from service.jobs.execution.ray_jobs import Capacity
from service.operations import health
from service.operations.health import DependencyChecks
from tests.support.service.fake_cluster import FakeCluster

PROBES = 400


@pytest.fixture
def _frequent_thread_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_frequent_thread_switches")
def test_concurrent_probes_report_every_dependency(sqlite_engine: Engine, tmp_path: Path) -> None:
    checks = DependencyChecks(sqlite_engine, str(tmp_path), FakeCluster())

    async def probe() -> list[dict[str, str]]:
        return await asyncio.gather(*(checks.report() for _ in range(PROBES)))

    reports = asyncio.run(probe())
    answers = {"ok", f"did not respond within {health.PROBE_TIMEOUT_S:g} s"}  # the latter on a busy machine
    assert all(report.keys() == {"database", "storage", "ray"} for report in reports)
    assert all({*report.values()} <= answers for report in reports)


@pytest.mark.slow
def test_a_hung_check_is_not_started_again(sqlite_engine: Engine, tmp_path: Path) -> None:
    started, ended = [], threading.Event()

    class HangingCluster(FakeCluster):
        def capacity(self) -> Capacity:
            started.append(1)
            ended.wait(60)
            return super().capacity()

    checks = DependencyChecks(sqlite_engine, str(tmp_path), HangingCluster())
    try:
        reports = [asyncio.run(checks.report()) for _ in range(2)]
    finally:
        ended.set()
    assert [report["ray"] for report in reports] == [f"did not respond within {health.PROBE_TIMEOUT_S:g} s"] * 2
    assert len(started) == 1
