"""Tests for discovering runs that were started outside the service."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import Engine

from amd.storage import write_json
from amd.training.lease import Lease
from amd.training.runs.launch import train
from service.jobs.actions import act, allowed_actions
from service.jobs.execution import external
from service.jobs.execution.external import SCAN_S, ExternalRunDiscovery
from service.jobs.store import JobFilter, JobStore
from tests.support.runs.tiny_runs import tiny_run
from tests.support.service.fake_cluster import FakeCluster, queued


def test_an_external_run_is_listed_with_its_result_and_allows_no_actions(sqlite_engine: Engine, tmp_path: Path) -> None:
    store = JobStore(sqlite_engine)
    config = tiny_run(tmp_path, name="by-hand", schedule__steps=4)
    result = train(config, local=True, quiet=True)
    ExternalRunDiscovery(store, FakeCluster(), str(tmp_path / "storage")).scan()
    (job,) = store.list(JobFilter(origin="external")).jobs
    assert (job.id, job.kind, job.state, job.origin) == ("by-hand", "train", "succeeded", "external")
    assert store.get(job.id).result == result.model_dump(mode="json")
    assert allowed_actions(job) == []


def test_an_external_run_belongs_to_the_project_it_was_started_for(
    sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, expected = JobStore(sqlite_engine), {}
    for number, project in enumerate((None, "vision", "not a project!")):
        if project is not None:
            monkeypatch.setenv("AMD_PROJECT", project)
        train(tiny_run(tmp_path, name=f"run-{number}", schedule__steps=4), local=True, quiet=True)
        expected[f"run-{number}"] = "vision" if project == "vision" else "default"
    ExternalRunDiscovery(store, FakeCluster(), str(tmp_path / "storage")).scan()
    assert {job.id: job.project for job in store.list(JobFilter(origin="external")).jobs} == expected


def test_the_state_of_an_external_run_is_derived_from_its_lease_and_result(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    store, root = JobStore(sqlite_engine), str(tmp_path)
    folder = tmp_path / "runs" / "alive"
    facts = {"id": "alive", "kind": "train", "created": "2026-01-01T00:00:00+00:00", "host": {"user": "me"}}
    write_json(str(folder / "run.json"), facts)
    write_json(str(folder / "config.json"), {"scaling": {"workers": [2, 2]}})
    discovery = ExternalRunDiscovery(store, FakeCluster(), root, clock=itertools.count(step=SCAN_S).__next__)
    lease = Lease(str(folder / "lease.json"))
    assert lease.acquire()
    discovery.scan()
    assert (store.get("alive").state, store.get("alive").workers) == ("running", 2)
    lease.release()
    discovery.scan()
    assert store.get("alive").state == "failed"
    assert "run the same command again to resume alive" in store.get("alive").message
    write_json(str(folder / "result.json"), {"state": "succeeded", "message": ""})
    discovery.scan()
    assert store.get("alive").state == "succeeded"


class RunningSubmission(NamedTuple):
    """A discovered run, `by-ray`, whose lease appears to be held by a process that `ray job submit` started."""

    discovery: ExternalRunDiscovery
    store: JobStore
    cluster: FakeCluster
    lease: Lease
    folder: Path

    def cancel(self) -> None:
        act(self.store, "by-ray", None, "cancel", "me")


@pytest.fixture
def running_submission(sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunningSubmission:
    store, cluster, folder = JobStore(sqlite_engine), FakeCluster(), tmp_path / "runs" / "by-ray"
    facts = {"id": "by-ray", "kind": "train", "created": "2026-01-01T00:00:00+00:00", "host": {"user": "me"}}
    write_json(str(folder / "run.json"), facts)
    write_json(str(folder / "config.json"), {})
    submitted_as(monkeypatch, "raysubmit_1")
    lease = Lease(str(folder / "lease.json"))
    assert lease.acquire()
    discovery = ExternalRunDiscovery(store, cluster, str(tmp_path), clock=itertools.count(step=SCAN_S).__next__)
    discovery.scan()
    return RunningSubmission(discovery, store, cluster, lease, folder)


def submitted_as(monkeypatch: pytest.MonkeyPatch, submission: str) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": submission}}))


def test_a_run_started_by_ray_job_submit_can_be_cancelled(running_submission: RunningSubmission) -> None:
    discovery, store, cluster, lease, folder = running_submission
    assert allowed_actions(store.get("by-ray")) == ["cancel"]
    running_submission.cancel()
    discovery.stop_cancelled()
    discovery.scan()
    assert (cluster.stopped, store.get("by-ray").state) == (["raysubmit_1"], "cancelling")
    lease.release()
    write_json(str(folder / "result.json"), {"state": "cancelled", "reason": "cancelled_by_user", "message": "step 3"})
    discovery.scan()
    job = store.get("by-ray")
    assert (job.state, job.reason, job.message) == ("cancelled", "cancelled_by_user", "step 3")
    assert [(attempt.submission_id, attempt.state) for attempt in store.attempts("by-ray")] == [
        ("raysubmit_1", "cancelled")
    ]


def test_a_submission_that_ray_kills_after_a_cancel_counts_as_cancelled(
    running_submission: RunningSubmission,
) -> None:
    running_submission.cancel()
    running_submission.lease.release()
    running_submission.discovery.scan()
    job = running_submission.store.get("by-ray")
    assert (job.state, job.reason) == ("cancelled", "deadline_exceeded")
    assert "RAY_JOB_STOP_WAIT_TIME_S" in job.message


def test_a_run_resumed_outside_ray_can_no_longer_be_cancelled(
    running_submission: RunningSubmission, monkeypatch: pytest.MonkeyPatch
) -> None:
    running_submission.cancel()
    running_submission.lease.release()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    by_hand = Lease(running_submission.lease.url)
    assert by_hand.acquire()
    running_submission.discovery.scan()
    by_hand.release()
    job = running_submission.store.get("by-ray")
    assert (job.state, job.wanted) == ("running", "run")
    assert "cannot be cancelled here" in job.message


def test_a_resubmitted_run_has_an_attempt_for_each_submission(
    running_submission: RunningSubmission, monkeypatch: pytest.MonkeyPatch
) -> None:
    running_submission.lease.release()
    running_submission.discovery.scan()
    submitted_as(monkeypatch, "raysubmit_2")
    again = Lease(running_submission.lease.url)
    assert again.acquire()
    running_submission.discovery.scan()
    again.release()
    attempts = running_submission.store.attempts("by-ray")
    assert [(attempt.submission_id, attempt.state) for attempt in attempts] == [
        ("raysubmit_1", "failed"),
        ("raysubmit_2", "running"),
    ]


def test_a_forged_lease_cannot_attach_a_jobs_submission_to_an_external_run(
    running_submission: RunningSubmission, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = queued(running_submission.store)
    running_submission.lease.release()
    for submission in (victim.id, f"{victim.id}-2"):
        submitted_as(monkeypatch, submission)
        forged = Lease(running_submission.lease.url)
        assert forged.acquire()
        running_submission.discovery.scan()
        forged.release()
    assert [attempt.submission_id for attempt in running_submission.store.attempts("by-ray")] == ["raysubmit_1"]


def test_job_runs_and_unreadable_folders_are_not_listed_as_external(sqlite_engine: Engine, tmp_path: Path) -> None:
    store = JobStore(sqlite_engine)
    ours = queued(store)
    for name, facts in {
        ours.id: {"kind": "train", "job": ours.id},
        f"{ours.id}-teacher": {"kind": "train", "job": ours.id},
        "broken": {"kind": "train", "created": "yesterday"},
        "odd": {"kind": "bake"},
        "a-list": [],
    }.items():
        write_json(str(tmp_path / "runs" / name / "run.json"), facts)
        write_json(str(tmp_path / "runs" / name / "config.json"), {})
    (tmp_path / "runs" / "empty").mkdir()
    ExternalRunDiscovery(store, FakeCluster(), str(tmp_path)).scan()
    assert [job.id for job in store.list(JobFilter()).jobs] == [ours.id]


def test_many_new_runs_are_read_over_several_scans(
    sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "READ_BATCH", 2)
    listings = list[str]()
    listed = external.listdir
    monkeypatch.setattr(external, "listdir", lambda url: (listings.append(url), listed(url))[1])
    store, seconds = JobStore(sqlite_engine), itertools.count(step=external.READ_BUDGET_S / 3)
    for number in range(6):
        run = tmp_path / "runs" / f"run-{number}"
        facts = {"id": run.name, "kind": "train", "created": f"2026-01-0{number + 1}T00:00:00+00:00"}
        write_json(str(run / "run.json"), facts)
        write_json(str(run / "config.json"), {})
        write_json(str(run / "result.json"), {"state": "succeeded"})
    for number in range(6):  # without run.json, so that they are read in every scan
        (tmp_path / "runs" / f"new-{number}").mkdir()
    discovery, counts = ExternalRunDiscovery(store, FakeCluster(), str(tmp_path), clock=lambda: next(seconds)), []
    for _ in range(4):
        discovery.scan()
        counts.append(len(store.list(JobFilter()).jobs))
    assert counts[0] < counts[-1] == 6
    assert listings.count(str(tmp_path / "runs")) < len(counts)
