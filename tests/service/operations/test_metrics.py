"""Tests for control-plane metrics: requests by route, loops, pools and job states.

Only one control plane exports the job states.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from service.app import create_app
from service.background import StepMonitor
from service.projects.storage import StoredBytesStore
from service.projects.usage import REFRESH_S, ResourceHours, UsageStore
from service.serving.deployments import new_deployment
from service.serving.schemas import ServingSettings
from service.settings import Settings
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster, queued


@pytest.fixture
def client(sqlite_engine: Engine, tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(Settings(data_dir=tmp_path, storage=str(tmp_path)), engine=sqlite_engine, cluster=FakeCluster())
    with TestClient(app, headers=key_to(sqlite_engine, "read")) as client:
        yield client


def samples(client: TestClient) -> dict[tuple[str, str], float]:
    """Return metric values by name and labels."""
    response = client.get("/metrics")
    assert response.status_code == 200
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_requests_are_measured_by_route_template(client: TestClient) -> None:
    for path in ("/v1/jobs/a", "/v1/jobs/b", "/v1/jobs", "/nowhere", "/livez"):
        client.get(path)
    found = samples(client)
    counts = {labels: value for (name, labels), value in found.items() if name == "amd_http_request_seconds_count"}
    assert counts == {
        "GET,/v1/jobs/{job_id},404": 2,
        "GET,/v1/jobs,200": 1,
        "GET,unmatched,404": 1,
        "GET,/livez,200": 1,
    }


def test_loops_pools_and_the_queue_are_measured(client: TestClient) -> None:
    state = client.app.state  # type: ignore[attr-defined]  # FastAPI
    monitor = StepMonitor("reconciler")
    state.monitors.append(monitor)
    queued(state.jobs, created_at=1.0)
    StoredBytesStore(state.engine).replace({"a": 1, "b": 2}, 0.0)
    found = samples(client)
    assert found["amd_loop_age_seconds", "reconciler"] >= 0
    assert found["amd_pool_size", "storage"] == 32
    assert found["amd_pool_used", "storage"] == 0
    assert found["amd_pool_size", "database"] == 30
    assert found["amd_jobs", "train,queued"] == 1
    assert found["amd_queue_age_seconds", ""] > 1e9
    assert found["amd_webhook_backlog", ""] == 0
    assert found["amd_stored_bytes", ""] == 3
    assert found["amd_database_up", ""] == 1


def test_replicas_are_counted_by_deployment(client: TestClient) -> None:
    deployed = new_deployment(
        "images", "default", "me", encoder="e", candidate=None, share=0.0, settings=ServingSettings()
    )
    deployed.replicas = 3
    client.app.state.deployments.put(deployed)  # type: ignore[attr-defined]  # FastAPI
    assert samples(client)["amd_deployment_replicas", "images"] == 3


def test_frequent_scrapes_share_one_usage_query(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, now = list[float](), 4e9
    by_project = UsageStore.by_project

    def count(store: UsageStore, since: float, until: float, project: str | None = None) -> dict[str, ResourceHours]:
        reads.append(until)
        return by_project(store, since, until, project)

    monkeypatch.setattr(UsageStore, "by_project", count)
    monkeypatch.setattr("service.operations.metrics.time.time", lambda: now)
    for _ in range(3):
        assert samples(client)["amd_usage_hours", "gpu"] == 0
    assert reads == [now]
    now += REFRESH_S
    samples(client)
    assert reads == [now - REFRESH_S, now]


def test_only_the_control_plane_that_reconciles_exports_job_states(client: TestClient) -> None:
    state = client.app.state  # type: ignore[attr-defined]  # FastAPI
    monitor = StepMonitor("reconciler")
    state.monitors.append(monitor)
    queued(state.jobs)
    for has_lease in (True, False):
        monitor.has_lease = has_lease
        found = samples(client)
        assert (("amd_jobs", "train,queued") in found) == has_lease
        assert found["amd_lease_held", "reconciler"] == has_lease


def test_metrics_are_exported_while_the_database_is_down(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OperationalError("SELECT", {}, Exception("out"))

    monkeypatch.setattr(client.app.state.jobs, "counts", fail)  # type: ignore[attr-defined]  # FastAPI
    found = samples(client)
    assert found["amd_database_up", ""] == 0
    assert ("amd_pool_used", "storage") in found
