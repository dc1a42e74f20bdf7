"""Tests that the storage meter counts every file of a project once, including files of runs that no job owns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import Engine

from amd import storage
from amd.storage import StorageUnreachable
from service.jobs.store import JobStore
from service.operations import storage_meter
from service.operations.storage_meter import INTERVAL_S, StorageMeter
from service.projects.schemas import ProjectPolicy
from service.projects.storage import StoredBytesStore
from service.projects.store import ProjectStore
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.service.fake_cluster import queued
from tests.support.service.fake_control_plane import FakeControlPlane


def write(root: Path, path: str, content: str) -> int:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return len(content)


def test_files_of_runs_jobs_and_encoders_count_towards_their_project(engine: Engine, tmp_path: Path) -> None:
    store = JobStore(engine)
    queued(store, id="sweep", kind="search", project="video")
    queued(store, id="by-hand", project="audio", origin="external", state="failed")
    index_encoder(engine, "imported", "robots")
    video = [
        write(tmp_path, "jobs/sweep/config.json", "{}"),
        write(tmp_path, "runs/sweep/trials/0000.json", "12"),
        write(tmp_path, "runs/sweep-0000-s0/checkpoints/step-1/model.safetensors", "c" * 100),
        write(tmp_path, "runs/sweep-teacher/run.json", json.dumps({"job": "sweep", "project": "other"})),
        write(tmp_path, "encoders/sweep/.encoder.json.0123abcd", "unfinished"),
    ]
    audio = [
        write(tmp_path, "runs/by-hand/log", "1"),
        write(tmp_path, "runs/not-listed/run.json", json.dumps({"job": None, "project": "audio"})),
    ]
    robots = [write(tmp_path, "encoders/imported/encoder.safetensors", "e" * 50)]
    default = [write(tmp_path, "runs/broken/run.json", "{"), write(tmp_path, "encoders/half/encoder.safetensors", "e")]
    assert StorageMeter(engine, str(tmp_path)).step()
    assert StoredBytesStore(engine).by_project() == {
        "video": sum(video),
        "audio": sum(audio),
        "robots": sum(robots),
        "default": sum(default),
    }


def test_one_control_plane_measures_once_per_interval_and_keeps_the_measurement_during_an_outage(
    sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, stored = 0.0, StoredBytesStore(sqlite_engine)
    first, second = (StorageMeter(sqlite_engine, str(tmp_path), clock=lambda: now) for _ in range(2))
    write(tmp_path, "runs/a/log", "1")
    assert (first.step(), second.step()) == (True, False)
    write(tmp_path, "runs/b/log", "22")
    first.step()
    assert stored.by_project() == {"default": 1}

    def fail(url: str) -> dict[str, storage.StoredFile]:
        raise StorageUnreachable(url)

    now = INTERVAL_S
    with monkeypatch.context() as patched:
        patched.setattr(storage_meter, "walk_files", fail)
        assert first.step()
    assert stored.by_project() == {"default": 1}
    now = 2 * INTERVAL_S
    first.step()
    assert stored.by_project() == {"default": 3}


def test_jobs_wait_until_their_project_is_below_its_storage_quota(sqlite_engine: Engine, tmp_path: Path) -> None:
    plane, stored = FakeControlPlane(sqlite_engine, tmp_path), StoredBytesStore(sqlite_engine)
    ProjectStore(sqlite_engine).put("default", ProjectPolicy(max_storage_gib=1), "test")
    stored.replace({"default": 2**30}, 0.0)
    job = queued(plane.store)
    plane.step()
    assert plane.now(job).message.startswith("waiting for free storage: project default stores 1.0 GiB")
    stored.replace({"default": 2**30 - 1}, 0.0)
    plane.step()
    assert plane.now(job).state == "starting"
