from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from amd.storage import write_json
from amd.training.lease import Lease
from amd.training.runs.launch import train
from service.jobs.execution import external
from service.jobs.execution.external import Discovery
from service.jobs.execution.reconciler import allowed_actions
from service.jobs.store import JobFilter, JobStore
from tests.support.runs.tiny_runs import tiny_run
from tests.support.service.fake_cluster import queued


def test_a_run_from_outside_is_shown_with_its_end_and_nothing_can_be_asked_of_it(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    store = JobStore(sqlite_engine)
    config = tiny_run(tmp_path, name="by-hand", schedule__steps=4)
    result = train(config, local=True, quiet=True)
    Discovery(store, str(tmp_path / "storage")).look()
    (job,) = store.list(JobFilter(origin="external")).jobs
    assert (job.id, job.kind, job.state, job.origin) == ("by-hand", "train", "succeeded", "external")
    assert store.get(job.id).result == result.model_dump(mode="json")
    assert allowed_actions(job) == []


def test_a_run_that_lives_is_running_and_one_that_died_without_a_word_has_failed(
    sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, root = JobStore(sqlite_engine), str(tmp_path)
    monkeypatch.setattr(external, "LOOK_S", 0.0)
    folder = tmp_path / "runs" / "alive"
    facts = {"id": "alive", "kind": "train", "created": "2026-01-01T00:00:00+00:00", "host": {"user": "me"}}
    write_json(str(folder / "run.json"), facts)
    write_json(str(folder / "config.json"), {"scaling": {"workers": [2, 2]}})
    discovery = Discovery(store, root)
    other = Lease(str(folder / "lease.json"))
    assert other.acquire()
    discovery.look()
    assert (store.get("alive").state, store.get("alive").workers) == ("running", 2)
    other.release()
    discovery.look()
    assert store.get("alive").state == "failed"
    assert "the same command continues alive" in store.get("alive").message
    write_json(str(folder / "result.json"), {"state": "succeeded", "message": ""})
    discovery.look()
    assert store.get("alive").state == "succeeded"


def test_jobs_of_the_service_their_parts_and_rubbish_are_not_shown_as_outside(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
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
    Discovery(store, str(tmp_path)).look()
    assert [job.id for job in store.list(JobFilter()).jobs] == [ours.id]
