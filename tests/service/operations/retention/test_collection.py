"""Tests that garbage collection frees what it reports, to the byte, and touches nothing that is in use."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from amd.storage import join, walk_files, write_bytes
from service.__main__ import _background_loops
from service.app import create_app
from service.db.engine import open_engine
from service.db.leases import LeaseKeeper
from service.db.models import Deletion, Delivery, IdempotencyKey, JobEvent, Webhook
from service.jobs.execution.deletion import remove_files
from service.jobs.store import JobStore
from service.operations.retention import collection
from service.operations.retention.collection import RetentionLoop, collect
from service.operations.retention.policy import RetentionPolicy
from service.settings import Settings
from service.web.errors import CollectionRunning
from tests.service.operations.retention.simulated_day import CHANGES, SimulatedDay
from tests.service.operations.retention.stored_data import DAY_S, ITEMS, StoredData, StoredItem, jobs_in, run_files
from tests.support.encoders.encoder_cards import publish
from tests.support.service.fake_cluster import FakeCluster, new_job

SLOW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
DAYS = st.sampled_from([None, 10.0, 60.0])
POLICIES = st.builds(
    RetentionPolicy,
    jobs_days=DAYS,
    trials_days=DAYS,
    logs_days=DAYS,
    checkpoints_days=DAYS,
    orphans_days=DAYS,
    history_days=DAYS,
)
BUSY_HOUR = ("submit", "submit", "progress", "end", "end", "move_alias", "deploy", "wait", "collect", "act", "undeploy")
EVERYTHING = RetentionPolicy(
    jobs_days=10, trials_days=10, logs_days=10, checkpoints_days=10, orphans_days=10, history_days=10
)
FAILED = StoredItem(
    is_sweep=False,
    state="failed",
    origin="api",
    days=30,
    has_encoder=False,
    has_manifest=True,
    has_facts=True,
    refers_to=0,
    reference="{id}",
    alias=False,
    size=100,
)


@contextmanager
def stored(template: Path, items: list[StoredItem]) -> Iterator[tuple[StoredData, Engine]]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(template, f"{folder}/control-plane.db")
        engine = open_engine(f"sqlite:///{folder}/control-plane.db")
        yield StoredData(Path(folder) / "root", engine, items), engine
        engine.dispose()


@SLOW
@given(items=ITEMS, policy=POLICIES)
def test_a_collection_frees_what_it_reports_to_the_byte_and_keeps_what_is_in_use(
    sqlite_template: Path, items: list[StoredItem], policy: RetentionPolicy
) -> None:
    with stored(sqlite_template, items) as (data, engine):
        store, root = JobStore(engine), str(data.root)
        before, in_use, rows = data.files(), data.in_use(), jobs_in(engine)
        reported = collect(root, policy, store, dry_run=True).removals
        assert data.files() == before
        removed = collect(root, policy, store, dry_run=False)
        assert (removed.removals, removed.skipped) == (reported, 0)

        after = data.files()
        freed = before.keys() - after.keys()
        assert sum(before[path] for path in freed) == sum(removal.size for removal in reported)
        assert sorted(freed) == sorted(path for removal in reported for path in removal.paths)
        assert not {path for path in freed if path.split("/")[1] in in_use}
        assert {id: rows[id] for id in in_use & rows.keys()} == {id: jobs_in(engine)[id] for id in in_use & rows.keys()}
        young = {id for n, item in enumerate(items) if item.days == 1 for id in (data.id(n), *data.trials(n))}
        assert not {path for path in freed if path.split("/")[1] in young}
        # Later collections remove the items that only removed items referred to.
        assert any(collect(root, policy, store, dry_run=False).removals == [] for _ in range(len(items) + 2))
        kept = {path for path in after if path.split("/")[1] in in_use | young}
        assert kept <= data.files().keys() <= after.keys()


@settings(SLOW, max_examples=5)
@given(
    changes=st.lists(st.tuples(st.sampled_from([*CHANGES, "collect"]), st.integers(0, 1000)), min_size=20, max_size=80),
    hours=st.sampled_from([2, 5, 12]),
)
@example(changes=[(change, number) for number in range(12) for change in BUSY_HOUR], hours=5)
def test_collections_during_a_day_of_traffic_free_what_they_report_and_nothing_in_use(
    sqlite_template: Path, changes: list[tuple[str, int]], hours: int
) -> None:
    fields = ("jobs", "trials", "logs", "checkpoints", "orphans", "history")
    policy = RetentionPolicy(**{f"{field}_days": hours / 24 for field in fields})
    with stored(sqlite_template, []) as (data, engine), pytest.MonkeyPatch.context() as patch:
        day = SimulatedDay(engine, data.root)
        patch.setattr(time, "time", day.clock)
        for change, number in [*changes, *[("wait", 5)] * 3, ("collect", 0)]:
            if change != "collect":
                day.make(change, number)
                continue
            before, in_use, names, rows = data.files(), day.in_use(), day.names(), jobs_in(engine)
            reported = collect(str(data.root), policy, day.plane.store, dry_run=True, clock=day.clock).removals
            assert (data.files(), jobs_in(engine)) == (before, rows)
            removed = collect(str(data.root), policy, day.plane.store, dry_run=False, clock=day.clock)
            assert (removed.removals, removed.skipped) == (reported, 0)
            after = data.files()
            freed = before.keys() - after.keys()
            assert sum(before.values()) - sum(after.values()) == sum(removal.size for removal in reported)
            assert sorted(freed) == sorted(path for removal in reported for path in removal.paths)
            assert not {path for path in freed if path.split("/")[1] in in_use}
            left = jobs_in(engine)
            assert {id: left[id] for id in in_use & rows.keys()} == {id: rows[id] for id in in_use & rows.keys()}
            assert day.names() == names


@SLOW
@given(items=ITEMS, killed_after=st.integers(0, 12))
def test_a_collection_that_is_killed_is_completed_by_the_next_one(
    sqlite_template: Path, items: list[StoredItem], killed_after: int
) -> None:
    with stored(sqlite_template, items) as (data, engine), pytest.MonkeyPatch.context() as patch:
        store, root, before = JobStore(engine), str(data.root), data.files()
        planned = {path for each in collect(root, EVERYTHING, store, dry_run=True).removals for path in each.paths}
        calls, remove = 0, collection.remove_file

        def remove_until_killed(url: str) -> None:
            nonlocal calls
            calls += 1
            if calls > killed_after:
                raise KeyboardInterrupt
            remove(url)

        patch.setattr(collection, "remove_file", remove_until_killed)
        with suppress(KeyboardInterrupt):
            collect(root, EVERYTHING, store, dry_run=False)
        patch.undo()
        for job in store.in_states(("deleting",)):  # as the reconciler does
            remove_files(root, job)
            store.finish_deletion(job)
        collect(root, EVERYTHING, store, dry_run=False)
        assert data.files().keys() == before.keys() - planned


def test_a_collection_on_s3_frees_what_it_reports_and_nothing_in_use(sqlite_engine: Engine, s3_root: str) -> None:
    root, store, ended = f"{s3_root}/amd", JobStore(sqlite_engine), time.time()
    for job_id in ("train-old", "train-parent"):
        with Session(sqlite_engine) as session, session.begin():
            session.add(new_job(id=job_id, state="failed", ended_at=ended, version=1))
        files = run_files(job_id, {"name": job_id}, job_id, size=100)
        for path, content in {f"runs/{job_id}/{name}": text for name, text in files.items()}.items():
            write_bytes(join(root, path), content.encode())
        write_bytes(join(root, "jobs", job_id, "logs/0001/0000000000000000.log"), b"log")
    weights = join(root, "runs/train-parent/checkpoints/step-00000001")
    publish(root, "train-student", config={"teacher": {"weights": weights}})
    write_bytes(join(root, "encoders/half/encoder.safetensors"), b"weights")

    before, later = walk_files(root), ended + 40 * DAY_S
    reported = collect(root, EVERYTHING, store, dry_run=True, clock=lambda: later).removals
    assert walk_files(root) == before
    assert collect(root, EVERYTHING, store, dry_run=False, clock=lambda: later).removals == reported
    freed = before.keys() - walk_files(root).keys()
    assert {"/".join(path.split("/")[:2]) for path in freed} == {"runs/train-old", "jobs/train-old", "encoders/half"}
    assert sum(before[path].size for path in freed) == sum(removal.size for removal in reported)
    assert jobs_in(sqlite_engine) == {"train-old": "deleted", "train-parent": "failed"}


def test_old_rows_are_counted_and_removed(engine: Engine, tmp_path: Path) -> None:
    now = time.time()
    rows = [
        *(
            IdempotencyKey(caller="a", key=str(age), request="", job_id="x", created_at=now - age)
            for age in (0, 90_000)
        ),
        *(
            Deletion(kind="encoder", object_id="x", actor="a", at=0.0, done_at=done)
            for done in (None, now, now - 40 * DAY_S)
        ),
        new_job(id="deleted", state="deleted", changed_at=now - 40 * DAY_S, version=1),
        Webhook(id="wh_1", url="https://example.com", secret="", events=[], created_at=now, created_by="a"),
    ]
    with Session(engine) as session, session.begin():
        session.add_all(rows)
        session.flush()
        session.add(JobEvent(job_id="deleted", version=1, at=now, type="deleted", actor="a", data={}))
        for version, (state, age) in enumerate([("waiting", 40), ("taken", 1), ("taken", 40), ("given_up", 40)]):
            fields = {"job_id": "x", "version": version, "body": {}, "tries": 1, "answer": "", "created_at": now}
            session.add(Delivery(webhook_id="wh_1", state=state, not_before=now - age * DAY_S, **fields))
    policy, store = RetentionPolicy(history_days=30, deliveries_days=30), JobStore(engine)
    planned = collect(str(tmp_path), policy, store, dry_run=True).removals
    assert {(removal.kind, removal.id): removal.rows for removal in planned} == {
        ("history", "deleted"): 1,
        ("history", ""): 1,
        ("idempotency_keys", ""): 1,
        ("deliveries", ""): 2,
    }
    assert collect(str(tmp_path), policy, store, dry_run=False).removals == planned
    assert collect(str(tmp_path), policy, store, dry_run=True).removals == []
    assert jobs_in(engine) == {}


def test_only_one_control_plane_collects_at_a_time(sqlite_template: Path) -> None:
    with stored(sqlite_template, [FAILED]) as (data, engine):
        other = LeaseKeeper(engine, collection.TASK)
        assert other.acquire()
        with pytest.raises(CollectionRunning):
            collect(str(data.root), EVERYTHING, JobStore(engine), dry_run=False)
        planned = collect(str(data.root), EVERYTHING, JobStore(engine), dry_run=True).removals
        assert [removal.kind for removal in planned] == ["jobs", "orphans"]
        other.release()
        assert collect(str(data.root), EVERYTHING, JobStore(engine), dry_run=False).removals == planned


def test_a_job_that_is_retried_during_a_collection_is_kept(
    sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stored(sqlite_template, [FAILED]) as (data, engine):
        store, before = JobStore(engine), data.files()
        plan = collection.plan_removals

        def plan_and_retry(*args: object) -> object:
            planned = plan(*args)  # type: ignore[arg-type]
            store.change(store.get("train-0"), "retry", state="queued", wanted="run")
            return planned

        monkeypatch.setattr(collection, "plan_removals", plan_and_retry)
        result = collect(str(data.root), RetentionPolicy(checkpoints_days=10), store, dry_run=False)
        assert (result.removals, result.skipped) == ([], 1)
        assert data.files() == before


def test_without_a_database_only_runs_that_no_job_owns_are_removed(sqlite_template: Path) -> None:
    items = [FAILED, FAILED._replace(state=None, origin="external", refers_to=1)]
    with stored(sqlite_template, items) as (data, _):
        result = collect(str(data.root), EVERYTHING, dry_run=False)
        assert {removal.id for removal in result.removals} == {"train-1"}


def test_the_loop_collects_once_per_interval_on_one_control_plane(sqlite_template: Path) -> None:
    with stored(sqlite_template, [FAILED]) as (data, engine):
        now = 0.0
        first, second = (
            RetentionLoop(JobStore(engine), str(data.root), EVERYTHING, clock=lambda: now) for _ in range(2)
        )
        assert (first.step(), second.step()) == (True, False)
        assert jobs_in(engine) == {"train-0": "deleted"}
        data = StoredData(data.root, engine, [FAILED._replace(state=None, origin="external")])
        first.step()
        assert "runs/train-0/result.json" in data.files()
        now = collection.INTERVAL_S
        first.step()
        assert data.files() == {}


def test_a_control_plane_collects_periodically_only_with_a_policy_for_user_data(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    def loops(**settings: float) -> set[str]:
        chosen = Settings(data_dir=tmp_path, storage=str(tmp_path), **settings)  # type: ignore[arg-type]
        app = create_app(chosen, engine=sqlite_engine, cluster=FakeCluster())
        return {loop.monitor.name for loop in _background_loops(app, chosen)}

    assert loops(retain_logs_days=30) - loops(retain_deliveries_days=1) == {"retention"}
