"""Tests for deleting jobs: which files are removed, and how deletion handles crashes and concurrent retries."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db.models import IdempotencyKey, Job
from service.jobs.actions import act
from service.jobs.execution import deletion
from service.jobs.execution.deletion import JobDeletions
from service.jobs.store import JobFilter, JobStore
from service.registry.store import EncoderStore
from service.web.errors import IllegalAction, KeyReused, NotFound
from tests.support.encoders.encoder_cards import index_encoder, publish
from tests.support.service.fake_cluster import queued


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def ended(store: JobStore, root: Path, **fields: Any) -> Job:
    """Return a failed job with a run, a log and an output."""
    job = queued(store, state="failed", attempt=1, **fields)
    for file in (f"runs/{job.id}/run.json", f"jobs/{job.id}/logs/0001/0.log", f"jobs/{job.id}/output/table.npy"):
        write(root / file)
    return job


def write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")


def complete(store: JobStore, root: Path, job: Job) -> Job:
    """Advance deletions as a restarted control plane would, until the job is deleted."""
    deletions = JobDeletions(store, str(root))
    while (found := store.get(job.id, deleted=True)).state != "deleted":
        deletions.advance()
        time.sleep(0.01)
    deletions.close()
    return found


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_deleting_a_job_removes_its_files_and_records_who_deleted_it(store: JobStore, root: Path) -> None:
    job, other = ended(store, root), ended(store, root)
    act(store, job.id, None, "delete", "alice")
    with pytest.raises(NotFound):
        store.get(job.id)
    assert [listed.id for listed in store.list(JobFilter()).jobs] == [other.id]
    deleted = complete(store, root, job)
    assert all(other.id in file for file in files(root))
    assert len(files(root)) == 3
    assert deleted.config == {}
    events = [(event.type, event.actor) for event in store.events(job.id)]
    assert events == [("created", "test"), ("delete", "alice"), ("deleted", "service")]
    assert [listed.id for listed in store.list(JobFilter(states=["deleted"])).jobs] == [job.id]
    assert store.counts() == {("train", "failed"): 1}
    assert act(store, job.id, None, "delete", "bob").version == deleted.version, "repeating a deletion has no effect"


def test_deleting_a_sweep_deletes_its_trials_and_nothing_else(store: JobStore, root: Path) -> None:
    sweep = ended(store, root, kind="search")
    kept = [f"runs/{sweep.id}-teacher/run.json", f"runs/{sweep.id}0-0000-s0/run.json", "runs/mine/run.json"]
    trials = [f"runs/{sweep.id}-{number:04d}-s{seed}/run.json" for number in (0, 12, 10_000) for seed in (0, 1)]
    ledger = root / "runs" / sweep.id / "trials" / "0000.json"
    for file in (*kept, *trials):
        write(root / file)
    write(ledger)
    ledger.write_text('{"runs": ["mine", "../encoders"]}')  # a job writes the ledger, so it is not trusted
    published = publish(str(root), f"{sweep.id}-0000-s0").id
    act(store, sweep.id, None, "delete", "alice")
    complete(store, root, sweep)
    encoder = {f"encoders/{published}/{name}" for name in ("encoder.json", "encoder.safetensors")}
    assert files(root) == {*kept, *encoder}


def test_a_deletion_continues_after_a_crash_or_a_failure(
    store: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ended(store, root, kind="search")
    write(root / "runs" / f"{sweep.id}-0000-s0" / "run.json")
    act(store, sweep.id, None, "delete", "alice")
    removed, remove = list[str](), deletion.remove

    def fails_at_the_second_folder(url: str) -> None:
        removed.append(url)
        if len(removed) == 2:
            raise OSError("the disk does not respond")
        remove(url)

    monkeypatch.setattr(deletion, "remove", fails_at_the_second_folder)
    crashed = JobDeletions(store, str(root))
    crashed.advance()
    assert isinstance(crashed._removals[sweep.id].exception(), OSError)
    crashed.close()
    assert store.get(sweep.id, deleted=True).state == "deleting"
    assert (root / "runs" / sweep.id).exists()
    with pytest.raises(NotFound):
        act(store, sweep.id, None, "retry", "alice")
    complete(store, root, sweep)
    assert files(root) == set()


def test_a_retry_and_a_deletion_exclude_each_other(store: JobStore, root: Path) -> None:
    job = ended(store, root)
    act(store, job.id, None, "retry", "bob")
    with pytest.raises(IllegalAction, match="its state is queued"):
        act(store, job.id, None, "delete", "alice")
    act(store, job.id, None, "cancel", "bob")
    act(store, job.id, None, "delete", "alice")
    with pytest.raises(NotFound):
        act(store, job.id, None, "retry", "bob")


def test_only_one_of_two_concurrent_requests_to_retry_and_delete_succeeds(store: JobStore, root: Path) -> None:
    for _ in range(10):
        job, start = ended(store, root), Barrier(2)

        def attempt(action: Any, job: Job = job, start: Barrier = start) -> bool:
            start.wait()
            try:
                act(store, job.id, None, action, "me")
            except (IllegalAction, NotFound):
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            retried, deleted = pool.map(attempt, ("retry", "delete"))
        assert retried != deleted
        deletions = JobDeletions(store, str(root))
        deletions.advance()
        deletions._remover.shutdown()
        assert (root / "runs" / job.id).exists() == retried, "a job that was started again keeps its files"


def test_the_idempotency_key_of_a_deleted_job_cannot_be_reused(store: JobStore, root: Path) -> None:
    job = queued(store, state="failed")
    row = {"caller": "me", "key": "key", "request": hashlib.sha256(b"request").hexdigest(), "job_id": job.id}
    with Session(store.engine) as session, session.begin():
        session.add(IdempotencyKey(**row, created_at=time.time()))
    act(store, job.id, None, "delete", "me")
    with pytest.raises(KeyReused, match="was deleted"):
        store.add_once(job, "me", "key", b"request")


def test_a_deleted_job_does_not_protect_its_encoders(store: JobStore, root: Path) -> None:
    index_encoder(store.engine, "e", "default")
    job = ended(store, root, config={"encoder": "e"})
    act(store, job.id, None, "delete", "alice")
    EncoderStore(store.engine).delete_encoder("e", "default", str(root), "alice")
