"""Tests for the discovery of runs that were started outside the service."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from sqlalchemy import Engine

from amd.storage import write_json
from amd.training.lease import Lease
from amd.training.runs.launch import train
from service.jobs.actions import allowed_actions
from service.jobs.execution.external import SCAN_S, ExternalRunDiscovery
from service.jobs.store import JobFilter, JobStore
from tests.support.runs.tiny_runs import tiny_run
from tests.support.service.fake_cluster import queued


def test_an_external_run_is_listed_with_its_result_and_allows_no_actions(sqlite_engine: Engine, tmp_path: Path) -> None:
    store = JobStore(sqlite_engine)
    config = tiny_run(tmp_path, name="by-hand", schedule__steps=4)
    result = train(config, local=True, quiet=True)
    ExternalRunDiscovery(store, str(tmp_path / "storage")).scan()
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
    ExternalRunDiscovery(store, str(tmp_path / "storage")).scan()
    assert {job.id: job.project for job in store.list(JobFilter(origin="external")).jobs} == expected


def test_the_state_of_an_external_run_is_derived_from_its_lease_and_result(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    store, root = JobStore(sqlite_engine), str(tmp_path)
    folder = tmp_path / "runs" / "alive"
    facts = {"id": "alive", "kind": "train", "created": "2026-01-01T00:00:00+00:00", "host": {"user": "me"}}
    write_json(str(folder / "run.json"), facts)
    write_json(str(folder / "config.json"), {"scaling": {"workers": [2, 2]}})
    discovery = ExternalRunDiscovery(store, root, clock=itertools.count(step=SCAN_S).__next__)
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


def test_job_runs_and_unreadable_folders_are_not_listed_as_external(sqlite_engine: Engine, tmp_path: Path) -> None:
    store = JobStore(sqlite_engine)
    ours = queued(store)
    for name, facts in {
        ours.id: {"kind": "train", "job": ours.id},
        f"{ours.id}-teacher": {"kind": "train", "job": ours.id},
        "broken": {"kind": "train", "created": "yesterday"},
        "odd": {"kind": "bake"},
    }.items():
        write_json(str(tmp_path / "runs" / name / "run.json"), facts)
        write_json(str(tmp_path / "runs" / name / "config.json"), {})
    (tmp_path / "runs" / "empty").mkdir()
    ExternalRunDiscovery(store, str(tmp_path)).scan()
    assert [job.id for job in store.list(JobFilter()).jobs] == [ours.id]
