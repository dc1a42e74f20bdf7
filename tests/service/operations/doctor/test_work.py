"""Tests for the doctor's checks of loops, leases, the queue, transitions, deployments and webhooks."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.background import LATE_S, StepMonitor
from service.db.leases import LeaseKeeper
from service.db.models import Delivery, Deployment, Webhook
from service.jobs.store import JobStore
from service.operations.doctor import work
from tests.support.service.fake_cluster import queued

NOW = time.time()
HOUR = 3600.0


def now() -> float:
    return NOW


def test_loops_that_are_late_or_failing_are_reported_by_name() -> None:
    seconds = 0.0
    monitors = [StepMonitor(name, clock=lambda: seconds) for name in ("reconciler", "webhooks")]
    assert work.check_loops(monitors).message == "reconciler 0 s ago, webhooks 0 s ago"
    seconds = LATE_S + 1
    with monitors[1].step():
        pass
    found = work.check_loops(monitors)
    assert (found.severity, "webhooks" in found.message) == ("error", False)
    assert work.check_loops([]).severity == "warning"


def test_tasks_that_no_control_plane_performs_are_reported(sqlite_engine: Engine) -> None:
    assert LeaseKeeper(sqlite_engine, "reconciler").acquire()
    assert work.check_leases(sqlite_engine, ["reconciler"]).severity == "ok"
    found = work.check_leases(sqlite_engine, ["reconciler", "deployer"])
    assert found.message == "no control plane performs: deployer"


def test_the_oldest_waiting_job_is_reported_with_the_reason_it_waits(sqlite_engine: Engine) -> None:
    assert work.check_queue(sqlite_engine, now).message == "no jobs are waiting"
    store = JobStore(sqlite_engine)
    queued(store, created_at=NOW)
    assert work.check_queue(sqlite_engine, now).severity == "ok"
    oldest = queued(store, created_at=NOW - 2 * HOUR, message="needs 8 CPUs")
    found = work.check_queue(sqlite_engine, now)
    assert found.severity == "warning"
    assert found.message == f"2 jobs waiting, the oldest ({oldest.id}) for 120 min: needs 8 CPUs"


def test_jobs_that_stay_in_a_transition_are_reported_as_stuck(sqlite_engine: Engine) -> None:
    store = JobStore(sqlite_engine)
    queued(store, state="starting", started_at=NOW - 10)
    queued(store, state="cancelling", stop_by=NOW)
    assert work.check_stuck_jobs(sqlite_engine, 600, now).severity == "ok"
    stuck = [
        queued(store, state="starting", started_at=NOW - HOUR),
        queued(store, state="pausing", stop_by=NOW - HOUR),
        queued(store, state="deleting", changed_at=NOW - 2 * HOUR),
    ]
    found = work.check_stuck_jobs(sqlite_engine, 600, now)
    assert found.message.startswith("3 jobs stuck")
    assert all(f"{job.id} ({job.state})" in found.message for job in stuck)


def add_delivery(engine: Engine, version: int, state: str, not_before: float) -> None:
    fields: dict[str, Any] = {"job_id": "x", "body": {}, "tries": 1, "answer": "", "created_at": NOW}
    with Session(engine) as session, session.begin():
        session.add(Delivery(webhook_id="wh_1", version=version, state=state, not_before=not_before, **fields))


def test_overdue_and_abandoned_deliveries_are_reported(sqlite_engine: Engine) -> None:
    with Session(sqlite_engine) as session, session.begin():
        session.add(Webhook(id="wh_1", url="", secret="", events=[], created_at=NOW, created_by="a"))
    add_delivery(sqlite_engine, 1, "waiting", NOW + HOUR)
    add_delivery(sqlite_engine, 2, "given_up", NOW - 48 * HOUR)
    assert work.check_webhooks(sqlite_engine, now).severity == "ok"
    add_delivery(sqlite_engine, 3, "given_up", NOW - HOUR)
    assert "amd webhooks deliveries" in work.check_webhooks(sqlite_engine, now).remedy
    add_delivery(sqlite_engine, 4, "waiting", NOW - HOUR)
    assert work.check_webhooks(sqlite_engine, now).severity == "error"


def test_a_failed_deployment_is_reported_with_its_message(sqlite_engine: Engine) -> None:
    assert work.check_deployments(sqlite_engine).severity == "ok"
    fields: dict[str, Any] = {"project": "default", "share": 0.0, "settings": {}, "serving": {}, "created_by": "a"}
    fields |= {"created_at": NOW, "changed_at": NOW, "version": 1, "encoder": "e"}
    with Session(sqlite_engine) as session, session.begin():
        session.add(Deployment(name="live", state="failed", message="there is no encoder 'e'", **fields))
    assert work.check_deployments(sqlite_engine).message == "live: there is no encoder 'e'"
