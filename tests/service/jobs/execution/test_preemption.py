"""Tests for the reconciler: quotas from the database, resources recorded by attempts, and preemption."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from service.db.models import Job
from service.jobs.actions import act
from service.jobs.execution.ray_jobs import Capacity
from service.projects.schemas import ProjectPolicy
from service.projects.store import ProjectStore
from tests.support.service.fake_cluster import queued, report_status
from tests.support.service.fake_control_plane import FakeControlPlane


def preempting(engine: Engine, root: Path) -> tuple[FakeControlPlane, Job, Job]:
    """Return a control plane, a running job that is being stopped, and the urgent job that preempts it."""
    plane = FakeControlPlane(engine, root, preemption=True)
    low = plane.running(cpus=4.0)
    urgent = queued(plane.store, cpus=2.0, priority=5)
    plane.step()
    return plane, low, urgent


def stop(plane: FakeControlPlane, job: Job) -> None:
    """Report that a job stopped after its final checkpoint, as asked."""
    facts = {"message": "stopped", "asked_to_stop": True}
    report_status(plane.root, plane.now(job), "cancelled", "cancelled_by_user", **facts)
    plane.step()


def test_project_quotas_apply_and_attempts_record_what_they_reserve(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path)
    plane.cluster.total = Capacity(8.0, 8.0, 1e9)
    ProjectStore(engine).put("default", ProjectPolicy(max_gpus=3), "test")
    first = queued(plane.store, workers=2, cpus=4.0, device="cuda")
    second = queued(plane.store, workers=2, cpus=2.0, device="cuda")
    plane.step()
    assert plane.cluster.submitted == [first.id]
    assert plane.now(second).message == (
        "waiting for free GPUs: the job needs 2, and project default is limited to 3, "
        "of which its jobs and deployments hold 2"
    )
    (attempt,) = plane.store.attempts(first.id)
    assert (attempt.cpus, attempt.gpus) == (4.0, 2.0)
    ProjectStore(engine).put("default", ProjectPolicy(max_gpus=4), "test")
    plane.step()
    assert plane.cluster.submitted == [first.id, second.id]


def test_a_preempted_job_saves_a_checkpoint_and_continues_after_the_urgent_one(engine: Engine, tmp_path: Path) -> None:
    plane, low, urgent = preempting(engine, tmp_path)
    assert (plane.now(low).state, plane.now(low).wanted) == ("pausing", "preempt")
    assert plane.cluster.stopped == [low.id]
    stop(plane, low)
    assert plane.now(urgent).state == "starting"
    assert (plane.now(low).state, plane.now(low).wanted) == ("queued", "run")
    assert "preempted by a job of higher priority" in plane.now(low).message
    report_status(plane.root, plane.now(urgent), "succeeded")
    plane.step()
    plane.offset_s += 6
    plane.step()
    assert (plane.now(low).state, plane.now(low).attempt) == ("starting", 2)
    assert [event.type for event in plane.store.events(low.id)][3:] == ["preempt", "queued", "starting"]


@pytest.mark.parametrize(("action", "ends"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_job_that_its_owner_stops_while_it_is_preempted_does_not_return_to_the_queue(
    engine: Engine, tmp_path: Path, action: str, ends: str
) -> None:
    plane, low, _ = preempting(engine, tmp_path)
    act(plane.store, low.id, None, action, "me")  # type: ignore[arg-type]
    stop(plane, low)
    assert plane.now(low).state == ends


def test_a_preempted_job_that_succeeds_first_ends_as_succeeded(engine: Engine, tmp_path: Path) -> None:
    plane, low, _ = preempting(engine, tmp_path)
    report_status(plane.root, plane.now(low), "succeeded")
    plane.step()
    assert plane.now(low).state == "succeeded"


def test_running_jobs_are_not_preempted_by_default(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path)
    low = plane.running(cpus=4.0)
    urgent = queued(plane.store, cpus=2.0, priority=5)
    plane.step()
    assert plane.now(low).state == "running"
    assert plane.now(urgent).message == "waiting for 2 CPUs to become free"
