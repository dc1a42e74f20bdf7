"""Tests for the diagnosis over REST: it requires an admin of all projects and completes even if a dependency hangs."""

from __future__ import annotations

import threading
from pathlib import Path

from sqlalchemy import Engine
from starlette.testclient import TestClient

from service.app import create_app
from service.operations.doctor.findings import Finding, ok, run_checks
from service.settings import Settings
from service.web.bounded_calls import BoundedCalls
from service.web.errors import ServiceError
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster


def test_an_admin_of_all_projects_gets_a_finding_per_check(sqlite_engine: Engine, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, storage=str(tmp_path / "root"))
    with TestClient(create_app(settings, engine=sqlite_engine, cluster=FakeCluster(cpus=0.0))) as client:
        for scope, project in (("submit", None), ("admin", "a")):
            headers = key_to(sqlite_engine, scope, project=project)
            assert client.get("/v1/doctor", headers=headers).status_code == 403
        found = client.get("/v1/doctor", headers=key_to(sqlite_engine, "admin")).json()
    severities = {finding["check"]: finding["severity"] for finding in found["findings"]}
    assert {"database", "clock", "storage", "ray", "queue", "jobs", "settings", "disk-data"} <= severities.keys()
    assert (severities["ray"], severities["database"]) == ("error", "ok")
    assert all(bool(finding["remedy"]) == (finding["severity"] != "ok") for finding in found["findings"])


def test_a_check_that_hangs_or_fails_is_reported_as_a_finding() -> None:
    calls, release = BoundedCalls("dependency", 4, 0.5, ServiceError), threading.Event()

    def hang() -> Finding:
        release.wait(60)
        return ok("storage", "")

    def fail() -> Finding:
        raise OSError("no such host")

    found = run_checks({"storage": hang, "ray": fail, "queue": lambda: ok("queue", "empty")}, calls)
    release.set()
    calls.close()
    assert [(finding.check, finding.severity) for finding in found] == [
        ("storage", "error"),
        ("ray", "error"),
        ("queue", "ok"),
    ]
    assert "did not respond within 0.5 s" in found[0].message
    assert found[1].message == "OSError: no such host"
