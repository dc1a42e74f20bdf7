"""Tests for encoder discovery on a local disk and on S3."""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from amd.artifacts.discovery import CARD, encoder_folder
from amd.storage import StorageUnreachable, file_operations, join, remove, write_bytes, write_json
from service.db.models import Deletion, RegisteredEncoder
from service.jobs.execution.protocol import JobFolder
from service.jobs.store import JobStore
from service.registry import discovery
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderFilter, EncoderStore
from service.web.errors import NotFound
from tests.support.encoders.encoder_cards import publish, score
from tests.support.service.fake_cluster import queued


@pytest.fixture
def store(engine: Engine) -> EncoderStore:
    return EncoderStore(engine)


@pytest.fixture(params=["disk", "S3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "disk" else f"{request.getfixturevalue('s3_root')}/amd"


@pytest.fixture(autouse=True)
def _scan_on_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "SCAN_INTERVAL_S", 0.0)


def listed(store: EncoderStore) -> list[str]:
    return [encoder.id for encoder in store.list(EncoderFilter()).encoders]


def test_encoders_are_added_updated_and_removed_with_their_cards(store: EncoderStore, root: str) -> None:
    encoder_discovery = EncoderDiscovery(store, root)
    encoder_discovery.scan()
    assert listed(store) == []
    publish(root, "old")
    publish(root, "new", hours=1)
    encoder_discovery.scan()
    assert listed(store) == ["new", "old"]
    publish(root, "old", scores=[score("knn", 71.5)])
    encoder_discovery.scan()
    assert store.get("old").card["scores"][0]["values"] == {"eval/top1": 71.5}
    remove(encoder_folder(root, "new"))
    encoder_discovery.scan()
    assert listed(store) == ["old"]
    with pytest.raises(NotFound):
        store.get("new")
    # The weights remain, but an encoder without a card is not published.
    remove(join(encoder_folder(root, "old"), CARD))
    publish(root, "other")
    encoder_discovery.scan()
    assert listed(store) == ["other"]


def test_an_invalid_card_is_logged_once_and_indexed_when_repaired(
    store: EncoderStore, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder_discovery = EncoderDiscovery(store, root)
    publish(root, "good")
    write_bytes(join(encoder_folder(root, "bad"), CARD), b"{")
    write_json(join(encoder_folder(root, "odd"), CARD), {"id": "odd"})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            encoder_discovery.scan()
    assert listed(store) == ["good"]
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted("encoders/bad" in message for message in messages) == [False, True]
    publish(root, "bad", hours=1)
    encoder_discovery.scan()
    assert listed(store) == ["bad", "good"]


def test_a_scan_without_changes_reads_no_card(store: EncoderStore, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        publish(root, f"e{number}")
    EncoderDiscovery(store, root).scan()

    def fail_on_read(url: str) -> bytes:
        raise AssertionError(url)

    monkeypatch.setattr(file_operations, "read_bytes", fail_on_read)
    EncoderDiscovery(store, root).scan()  # the first scan in a new process reads no card either
    assert len(listed(store)) == 3


def test_an_unreachable_store_or_unmounted_disk_removes_no_encoder(
    store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder_discovery = EncoderDiscovery(store, str(tmp_path))
    publish(str(tmp_path), "mine")
    encoder_discovery.scan()
    (tmp_path / "encoders").rename(tmp_path / "elsewhere")
    encoder_discovery.scan()
    assert listed(store) == ["mine"]
    (tmp_path / "elsewhere").rename(tmp_path / "encoders")

    def unavailable(*args: object, **named: object) -> None:
        raise OSError("not now")

    with monkeypatch.context() as patched:
        patched.setattr("fsspec.implementations.local.LocalFileSystem.find", unavailable)
        with pytest.raises(StorageUnreachable):
            encoder_discovery.scan()
    assert listed(store) == ["mine"]


def test_an_encoder_belongs_to_the_project_of_the_job_that_published_it(
    engine: Engine, store: EncoderStore, tmp_path: Path
) -> None:
    jobs, root = JobStore(engine), str(tmp_path)
    trained = queued(jobs, project="video", state="succeeded")
    parent = queued(jobs, project="sweeps")
    write_json(str(tmp_path / "runs" / "a-teacher" / "run.json"), {"job": parent.id})
    imported = queued(jobs, project="imports", kind="import", config={"id": "timm-s"}, state="running")
    for name in ("timm-s", "by-hand"):  # the same ids; these jobs publish nothing
        queued(jobs, project="others", kind="import", config={"id": name}, state="running")
    external = queued(jobs, project="default", origin="external")
    publish(root, trained.id)
    publish(root, "a-teacher")
    publish(root, "timm-s", run=trained.id, job=imported.id, objective=None)  # imported from a copy of `trained`
    publish(root, "by-hand", run=None)
    publish(root, external.id)
    EncoderDiscovery(store, root).scan()
    owners = {encoder.id: (encoder.project, encoder.job_id) for encoder in store.list(EncoderFilter()).encoders}
    assert owners == {
        trained.id: ("video", trained.id),
        "a-teacher": ("sweeps", parent.id),
        "timm-s": ("imports", imported.id),
        "by-hand": ("default", None),
        external.id: ("default", None),
    }
    jobs.finish_deletion(trained)
    publish(root, trained.id, scores=[score("knn", 50.0)])
    EncoderDiscovery(store, root).scan()
    assert store.get(trained.id).project == "video"  # a new card does not change the owner
    assert store.get(trained.id).card["scores"]
    publish(root, "by-hand", run=None, job=imported.id)
    EncoderDiscovery(store, root).scan()
    assert store.get("by-hand").project == "imports"  # another job has published the id since


def test_owners_are_rebuilt_from_the_storage_root_after_the_database_is_lost(store: EncoderStore, root: str) -> None:
    write_json(JobFolder(root, "train-1").request, {"kind": "train", "project": "video"})
    write_json(JobFolder(root, "train-0").request, {"kind": "train"})  # written by version 0.1
    write_json(join(root, "runs", "a-teacher", "run.json"), {"job": "train-1"})
    for name in ("train-0", "train-1", "a-teacher"):
        publish(root, name)
    EncoderDiscovery(store, root).scan()
    owners = {encoder.id: encoder.project for encoder in store.list(EncoderFilter()).encoders}
    assert owners == {"train-0": "default", "train-1": "video", "a-teacher": "video"}


def test_a_job_that_succeeds_triggers_a_scan_ahead_of_schedule(
    engine: Engine, store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "SCAN_INTERVAL_S", 3600.0)
    monkeypatch.setattr(discovery, "LOCAL_SCAN_INTERVAL_S", 3600.0)
    jobs, root, encoder_discovery = JobStore(engine), str(tmp_path), EncoderDiscovery(store, str(tmp_path))
    job = queued(jobs)
    encoder_discovery.scan()
    publish(root, job.id)
    time.sleep(0.01)
    encoder_discovery.scan()
    assert listed(store) == []
    jobs.change(job, "succeeded", state="succeeded")
    encoder_discovery.scan()
    assert listed(store) == [job.id]
    later = EncoderDiscovery(store, root, clock=lambda: time.time() + 4000)
    publish(root, "by-hand", hours=1)
    later.scan()
    assert listed(store) == ["by-hand", job.id]


def test_a_local_root_is_scanned_often_unless_listing_it_is_slow(
    store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "SCAN_INTERVAL_S", 30.0)
    now = 0.0
    encoder_discovery = EncoderDiscovery(store, str(tmp_path), clock=lambda: now)

    def delay(name: str) -> float:
        """Publish an encoder; return the seconds until it is listed."""
        nonlocal now
        publish(str(tmp_path), name)
        published = now
        while name not in listed(store):
            now += 1.0
            encoder_discovery.scan()
        return now - published

    encoder_discovery.scan()
    assert delay("soon") <= 2
    monkeypatch.setattr(discovery, "LISTING_SHARE", 1e-12)
    assert delay("later") == 30


def test_many_encoders_are_read_in_several_scans(
    store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "SCAN_INTERVAL_S", 3600.0)
    for number in range(5):
        publish(str(tmp_path), f"e{number}", hours=-number)
    ticks = itertools.count(step=2.0)  # a clock that advances by seconds for each card
    encoder_discovery, counts = EncoderDiscovery(store, str(tmp_path), clock=lambda: next(ticks)), list[int]()
    for _ in range(6):
        encoder_discovery.scan()
        counts.append(len(listed(store)))
    assert 0 < counts[0] < counts[1]
    assert listed(store) == [f"e{number}" for number in range(5)]


def test_a_listing_that_takes_longer_than_the_read_budget_does_not_prevent_reads(
    store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(str(tmp_path), "e")
    now, listed_files = 0.0, discovery.files

    def list_slowly(url: str) -> object:
        nonlocal now
        now += discovery.READ_BUDGET_S + 1
        return listed_files(url)

    monkeypatch.setattr(discovery, "files", list_slowly)
    EncoderDiscovery(store, str(tmp_path), clock=lambda: now).scan()
    assert listed(store) == ["e"]


def test_deleting_an_encoder_survives_a_crash_and_its_id_can_be_reused(
    engine: Engine, store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    publish(root, "e")
    EncoderDiscovery(store, root).scan()
    found = store.get("e")
    columns = RegisteredEncoder.__mapper__.columns
    read = RegisteredEncoder(**{column.key: getattr(found, column.key) for column in columns})
    store.delete_encoder("e", None, root, "alice")

    def crash(url: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(discovery, "remove", crash)
        with pytest.raises(KeyboardInterrupt):
            EncoderDiscovery(store, root).scan()
    store.upsert(read)  # by a scan that had read the card before the deletion
    assert listed(store) == []
    EncoderDiscovery(store, root).scan()
    assert (listed(store), (tmp_path / "encoders" / "e").exists()) == ([], False)
    with Session(engine) as session:
        deletion = session.query(Deletion).one()
        assert (deletion.kind, deletion.object_id, deletion.actor) == ("encoder", "e", "alice")
        assert deletion.done_at is not None
    publish(root, "e")
    EncoderDiscovery(store, root).scan()
    assert listed(store) == ["e"]
