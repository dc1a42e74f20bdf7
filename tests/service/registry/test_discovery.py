"""The index of encoders follows the storage root, on a disk and on S3."""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine

from amd import storage
from amd.artifacts.discovery import CARD, encoder_folder
from amd.storage import StorageUnreachable, join, remove, write_bytes, write_json
from service.jobs.store import JobStore
from service.registry import discovery
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderFilter, EncoderStore
from service.web.errors import NotFound
from tests.support.service.encoder_cards import publish, score
from tests.support.service.fake_cluster import queued


@pytest.fixture
def store(engine: Engine) -> EncoderStore:
    return EncoderStore(engine)


@pytest.fixture(params=["disk", "S3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "disk" else f"{request.getfixturevalue('s3_root')}/amd"


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "LOOK_S", 0.0)


def listed(store: EncoderStore) -> list[str]:
    return [encoder.id for encoder in store.list(EncoderFilter()).encoders]


def test_encoders_come_change_and_go_as_their_cards_do(store: EncoderStore, root: str) -> None:
    found = EncoderDiscovery(store, root)
    found.look()
    assert listed(store) == []
    publish(root, "old")
    publish(root, "new", hours=1)
    found.look()
    assert listed(store) == ["new", "old"]
    publish(root, "old", scores=[score("knn", 71.5)])
    found.look()
    assert store.get("old").card["scores"][0]["values"] == {"eval/top1": 71.5}
    remove(encoder_folder(root, "new"))
    found.look()
    assert listed(store) == ["old"]
    with pytest.raises(NotFound):
        store.get("new")
    remove(join(encoder_folder(root, "old"), CARD))  # its weights lie there still, and yet it is not published
    publish(root, "other")
    found.look()
    assert listed(store) == ["other"]


def test_a_broken_card_is_told_once_and_shown_once_it_is_mended(
    store: EncoderStore, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = EncoderDiscovery(store, root)
    publish(root, "good")
    write_bytes(join(encoder_folder(root, "bad"), CARD), b"{")
    write_json(join(encoder_folder(root, "odd"), CARD), {"id": "odd"})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found.look()
    assert listed(store) == ["good"]
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted("encoders/bad" in message for message in told) == [False, True]
    publish(root, "bad", hours=1)
    found.look()
    assert listed(store) == ["bad", "good"]


def test_a_look_at_nothing_new_reads_no_card(store: EncoderStore, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        publish(root, f"e{number}")
    EncoderDiscovery(store, root).look()

    def refuse(url: str) -> bytes:
        raise AssertionError(url)

    monkeypatch.setattr(storage, "read_bytes", refuse)
    EncoderDiscovery(store, root).look()  # nor does another process's first
    assert len(listed(store)) == 3


def test_a_store_that_is_away_and_a_disk_that_is_not_mounted_take_nothing_away(
    store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = EncoderDiscovery(store, str(tmp_path))
    publish(str(tmp_path), "mine")
    found.look()
    (tmp_path / "encoders").rename(tmp_path / "elsewhere")
    found.look()
    assert listed(store) == ["mine"]
    (tmp_path / "elsewhere").rename(tmp_path / "encoders")

    def away(*words: object, **named: object) -> None:
        raise OSError("not now")

    with monkeypatch.context() as patched:
        patched.setattr("fsspec.implementations.local.LocalFileSystem.find", away)
        with pytest.raises(StorageUnreachable):
            found.look()
    assert listed(store) == ["mine"]


def test_an_encoder_belongs_to_the_project_of_the_job_that_published_it(
    engine: Engine, store: EncoderStore, tmp_path: Path
) -> None:
    jobs, root = JobStore(engine), str(tmp_path)
    trained = queued(jobs, project="video", state="succeeded")
    above = queued(jobs, project="sweeps")
    write_json(str(tmp_path / "runs" / "a-teacher" / "run.json"), {"job": above.id})
    imported = queued(jobs, project="brought", kind="import", config={"id": "timm-s"}, state="running")
    queued(jobs, project="others", kind="import", config={"id": "by-hand"}, state="failed")
    outside = queued(jobs, project="default", origin="external")
    publish(root, trained.id)
    publish(root, "a-teacher")
    publish(root, "timm-s", run=None, objective=None)
    publish(root, "by-hand", run=None)
    publish(root, outside.id)
    EncoderDiscovery(store, root).look()
    owners = {encoder.id: (encoder.project, encoder.job_id) for encoder in store.list(EncoderFilter()).encoders}
    assert owners == {
        trained.id: ("video", trained.id),
        "a-teacher": ("sweeps", above.id),
        "timm-s": ("brought", imported.id),
        "by-hand": (None, None),
        outside.id: (None, None),
    }
    jobs.delete(trained)
    publish(root, trained.id, scores=[score("knn", 50.0)])
    EncoderDiscovery(store, root).look()
    assert store.get(trained.id).project == "video"  # whose it is does not change with its card
    assert store.get(trained.id).card["scores"]


def test_it_looks_at_once_when_a_job_has_succeeded_and_otherwise_now_and_then(
    engine: Engine, store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "LOOK_S", 3600.0)
    jobs, root, found = JobStore(engine), str(tmp_path), EncoderDiscovery(store, str(tmp_path))
    job = queued(jobs)
    found.look()
    publish(root, job.id)
    time.sleep(0.01)
    found.look()
    assert listed(store) == []
    jobs.change(job, "succeeded", state="succeeded")
    found.look()
    assert listed(store) == [job.id]
    later = EncoderDiscovery(store, root, clock=lambda: time.time() + 4000)
    publish(root, "by-hand", hours=1)
    later.look()
    assert listed(store) == ["by-hand", job.id]


def test_a_root_of_many_encoders_is_read_in_several_looks(
    store: EncoderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "LOOK_S", 3600.0)
    for number in range(5):
        publish(str(tmp_path), f"e{number}", hours=-number)
    ticks = itertools.count(step=2.0)  # of a clock by which each card takes seconds
    found, counts = EncoderDiscovery(store, str(tmp_path), clock=lambda: next(ticks)), list[int]()
    for _ in range(6):
        found.look()
        counts.append(len(listed(store)))
    assert 0 < counts[0] < counts[1]
    assert listed(store) == [f"e{number}" for number in range(5)]
