"""Tests for garbage collection over REST, which requires an admin of all projects."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine
from starlette.testclient import TestClient

from service.app import create_app
from service.jobs.store import JobStore
from service.operations.retention.collection import collect
from service.operations.retention.history import last_collections
from service.operations.retention.policy import RetentionPolicy
from service.projects.audit import AuditFilter, AuditLog
from service.settings import Settings
from tests.service.operations.retention.stored_data import DAY_S, StoredData, jobs_in
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

        retention = client.get("/v1/gc", headers=admin).json()
        assert (retention["policy"]["jobs_days"], retention["policy"]["logs_days"]) == (60, None)
        newest, first = retention["collections"]
        assert (newest["files"], first["bytes"], first["items"], first["rows"]) == (2, removed["bytes"], 1, 1)
        assert first["actor"] == admin["Authorization"].split("_")[1]
        assert first["started_at"] <= first["ended_at"] <= newest["started_at"]


def test_periodic_collections_are_recorded_for_thirty_days(sqlite_engine: Engine, tmp_path: Path) -> None:
    store, root = JobStore(sqlite_engine), str(tmp_path / "root")
    for day in (0, 20, 40):
        collect(root, RetentionPolicy(), store, dry_run=False, clock=lambda at=day: 4e9 + at * DAY_S)
    found = last_collections(sqlite_engine, 10)
    assert [(each.started_at - 4e9) / DAY_S for each in found] == [40, 20]
    assert {each.actor for each in found} == {"service"}
    assert AuditLog(sqlite_engine).list(AuditFilter())[0] == [], "only users' changes are audited"
