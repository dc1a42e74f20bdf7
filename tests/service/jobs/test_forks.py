"""Tests for forks, which are copies of jobs that start from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from amd.storage import join
from amd.training.run_folder import run_folder
from service.app import create_app
from service.db.engine import open_engine
from service.jobs.store import JobStore
from service.settings import Settings
from tests.support.browser import scenes
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forks")


@pytest.fixture(scope="module")
def database(sqlite_template: Path, folder: Path) -> Iterator[Engine]:
    shutil.copy(sqlite_template, folder / "control-plane.db")
    engine = open_engine(f"sqlite:///{folder / 'control-plane.db'}")
    scenes.populate(engine, str(folder / "root"))
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def client(database: Engine, folder: Path) -> TestClient:
    settings = Settings(data_dir=folder, storage=str(folder / "root"), serve_url="http://127.0.0.1:1")
    return TestClient(create_app(settings, engine=database, cluster=FakeCluster()))


def test_a_fork_has_the_jobs_config_with_changes_and_starts_from_the_checkpoint(
    client: TestClient, database: Engine, folder: Path
) -> None:
    body = {"step": 500, "overrides": {"optim.base_lr": 1e-4, "start": "elsewhere"}, "name": "lower rate"}
    headers = key_to(database, "submit") | {"Idempotency-Key": "once"}
    response = client.post(f"/v1/jobs/{scenes.RUNNING}/fork", json=body, headers=headers)
    assert response.status_code == 202, response.text
    assert client.post(f"/v1/jobs/{scenes.RUNNING}/fork", json=body, headers=headers).json() == response.json()
    fork, original = (JobStore(database).get(id) for id in (response.json()["id"], scenes.RUNNING))
    checkpoint = join(run_folder(str(folder / "root"), scenes.RUNNING), "checkpoints", "step-00000500")
    assert (fork.name, fork.config["start"], fork.config["optim"]["base_lr"]) == ("lower rate", checkpoint, 1e-4)
    same = ("student", "teacher", "mask", "data")
    assert [fork.config[name] for name in same] == [original.config[name] for name in same]


@pytest.mark.parametrize(
    ("job", "body", "status", "message"),
    [
        (scenes.RUNNING, {"step": 501}, 404, "has no checkpoint at step 501"),
        (scenes.SWEEP, {"step": 500}, 409, "only pre-training"),
        (scenes.RUNNING, {"step": 0}, 422, ""),
        (scenes.RUNNING, {"step": 10**30}, 422, ""),
        (scenes.RUNNING, {"step": 500, "overrides": {"mask.teacher_ratio": 0.95}}, 422, "mask.teacher_ratio=0.95"),
        ("train-never", {"step": 500}, 404, "train-never"),
    ],
)
def test_an_impossible_fork_is_rejected(
    client: TestClient, database: Engine, job: str, body: dict[str, object], status: int, message: str
) -> None:
    response = client.post(f"/v1/jobs/{job}/fork", json=body, headers=key_to(database, "submit"))
    assert response.status_code == status
    assert message in response.text


def test_a_job_cannot_start_from_another_projects_checkpoint(
    client: TestClient, database: Engine, folder: Path
) -> None:
    headers = key_to(database, "submit", project="other")
    assert client.post(f"/v1/jobs/{scenes.RUNNING}/fork", json={"step": 500}, headers=headers).status_code == 404
    start = join(run_folder(str(folder / "root"), scenes.RUNNING), "checkpoints", "step-00000500")
    body = {"kind": "train", "preset": "demo-image-amd", "overrides": {"start": start}}
    response = client.post("/v1/jobs", json=body, headers=headers)
    assert response.status_code == 404
    assert response.json()["field"] == "start"
