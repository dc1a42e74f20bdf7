"""Tests for the reconciler's failure count: a job that makes progress may fail any number of times."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from amd.storage import write_json
from service.db.models import Job
from tests.support.service.fake_cluster import report_status
from tests.support.service.fake_control_plane import FakeControlPlane


@pytest.fixture
def plane(sqlite_engine: Engine, tmp_path: Path) -> FakeControlPlane:
    return FakeControlPlane(sqlite_engine, tmp_path)


def fail_and_restart(plane: FakeControlPlane, job: Job) -> Job:
    """Report an infrastructure failure, then start the next attempt, if any. Returns the job as it was in between."""
    report_status(plane.root, plane.now(job), "failed", "node_lost", message="lost")
    plane.step()
    failed = plane.now(job)
    plane.offset_s += 301
    plane.step()
    return failed


def test_failures_are_counted_since_the_newest_checkpoint(plane: FakeControlPlane) -> None:
    job = plane.running()
    for step in range(10, 110, 10):
        write_json(f"{plane.root}/runs/{job.id}/checkpoints/step-{step:08d}/manifest.json", {})
        failed = fail_and_restart(plane, job)
        assert (failed.state, failed.retries) == ("retrying", 1), "max_retries=2"
        assert failed.message == f"failure 1 of 2 since step {step}, retrying after: lost"
    assert fail_and_restart(plane, job).message == "failure 2 of 2 since step 100, retrying after: lost"
    failed = fail_and_restart(plane, job)
    assert (failed.state, failed.attempt) == ("failed", 12)
    assert failed.message == "lost; failure 3 since step 100, max_retries=2 allows no more"


def test_only_a_newer_committed_checkpoint_resets_the_failure_count(
    plane: FakeControlPlane,
) -> None:
    job = plane.running()
    folder = f"{plane.root}/runs/{job.id}/checkpoints"
    assert fail_and_restart(plane, job).retries == 1
    write_json(f"{folder}/step-00000010/state.json", {})
    assert fail_and_restart(plane, job).retries == 2
    write_json(f"{folder}/step-00000010/manifest.json", {})
    report_status(plane.root, plane.now(job), "cancelled", "cancelled_by_user", asked_to_stop=True)  # its node left
    plane.step()
    assert plane.now(job).state == "queued"
    plane.offset_s += 10
    plane.step()
    assert fail_and_restart(plane, job).retries == 1
