"""Garbage collection over REST, for admins of all projects."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.service.operations.retention.stored_data import StoredData, jobs_in
from tests.service.operations.retention.test_collection import FAILED
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster


def test_an_admin_of_all_projects_collects_with_the_configured_or_a_given_policy(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    data = StoredData(tmp_path / "root", sqlite_engine, [FAILED, FAILED._replace(days=90)])
    settings = Settings(data_dir=tmp_path, storage=str(tmp_path / "root"), retain_jobs_days=60)
    admin = key_to(sqlite_engine, "admin")
    with TestClient(create_app(settings, engine=sqlite_engine, cluster=FakeCluster())) as client:
        assert client.post("/v1/gc", json={}, headers=key_to(sqlite_engine, "submit")).status_code == 403
        assert client.post("/v1/gc", json={}, headers=key_to(sqlite_engine, "admin", project="a")).status_code == 403

        report = client.post("/v1/gc", json={"dry_run": True}, headers=admin).json()
        before = data.files()
        assert [(kind["kind"], kind["items"]) for kind in report["kinds"]] == [("jobs", 1)]
        assert report["items"][0]["id"] == "train-1"
        removed = client.post("/v1/gc", json={}, headers=admin).json()
        assert (removed["bytes"], removed["files"]) == (report["bytes"], report["files"])
        assert sum(before.values()) - sum(data.files().values()) == report["bytes"] > 0
        assert jobs_in(sqlite_engine) == {"train-0": "failed", "train-1": "deleted"}
        history = client.get("/v1/jobs/train-1/history", headers=admin).json()
        assert "service" not in {event["actor"] for event in history["items"] if event["type"] == "delete"}

        given = {"policy": {"logs_days": 10}}
        (logs,) = client.post("/v1/gc", json=given, headers=admin).json()["kinds"]
        assert (logs["kind"], logs["files"]) == ("logs", 2)
        assert client.post("/v1/gc", json={"policy": {"logs_days": 0}}, headers=admin).status_code == 422
