"""Tests for projects, quotas and usage through the REST API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service.app import create_app
from service.db.models import Attempt, Job
from service.jobs.store import JobStore
from service.projects.schemas import ProjectPolicy
from service.projects.store import ProjectStore
from service.projects.usage import HOUR_S, UsageStore, start_of_month
from service.settings import Settings
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster, queued

JOB = {"kind": "train", "preset": "demo-image-amd"}


@pytest.fixture
def client(sqlite_engine: Engine, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(storage=str(tmp_path / "storage"), data_dir=tmp_path)
    app = create_app(settings, engine=sqlite_engine, cluster=FakeCluster(cpus=64.0, gpus=64.0))
    with TestClient(app) as client:
        yield client


@pytest.fixture
def admin(sqlite_engine: Engine) -> dict[str, str]:
    return key_to(sqlite_engine, "admin")


def attempt(engine: Engine, job: Job, number: int = 1, **fields: Any) -> None:
    """Store an attempt, by default one that took two hours on 4 CPUs and 1 GPU."""
    facts: dict[str, Any] = {"submission_id": job.id, "state": "failed", "message": "", "cpus": 4.0, "gpus": 1.0}
    times = {"started_at": 0.0, "ended_at": 2 * HOUR_S}
    with Session(engine) as session, session.begin():
        session.add(Attempt(job_id=job.id, number=number, **{**facts, **times, **fields}))


def test_a_policy_is_stored_replaced_and_visible_to_admins_of_its_project(
    client: TestClient, admin: dict[str, str], sqlite_engine: Engine
) -> None:
    body = {"share": 2, "max_gpus": 16, "gpu_hours_per_month": 500}
    created = client.put("/v1/projects/video", json=body, headers=admin).json()
    assert {**body, "name": "video", "max_workers": None, "gpu_hours": 0.0}.items() <= created.items()
    assert client.put("/v1/projects/video", json={"share": 3}, headers=admin).json()["max_gpus"] is None
    own, other = (key_to(sqlite_engine, "admin", project=project) for project in ("video", "audio"))
    assert client.get("/v1/projects/video", headers=own).json()["share"] == 3
    assert client.get("/v1/projects/video", headers=other).status_code == 404
    assert [item["name"] for item in client.get("/v1/projects", headers=own).json()["items"]] == ["video"]
    assert client.get("/v1/projects", headers=other).json()["items"] == []
    rejected = client.put("/v1/projects/video", json={"share": 9}, headers=own)
    assert (rejected.status_code, rejected.json()["code"]) == (403, "forbidden")


def test_storage_credentials_are_kept_until_they_are_replaced_or_removed(
    client: TestClient, admin: dict[str, str], sqlite_engine: Engine
) -> None:
    sets = {"sets": {"prefixes": ["s3://bucket/sets"], "secret": "file:/var/run/secrets/amd/sets"}}
    assert client.get("/v1/projects", headers=admin).json()["items"] == []
    put = partial(client.put, "/v1/projects/video", headers=admin)
    assert put(json={"share": 2}).json()["credentials"] is None
    assert put(json={"credentials": sets}).json()["credentials"] == sets
    assert put(json={"share": 3}).json()["credentials"] == sets, "a change of a quota must not remove them"
    own, other, submit = (
        key_to(sqlite_engine, scope, project=project)
        for scope, project in (("admin", "video"), ("admin", "audio"), ("submit", "video"))
    )
    assert client.get("/v1/projects/video", headers=own).json()["credentials"] == sets
    assert client.get("/v1/projects/video", headers=other).status_code == 404
    assert client.get("/v1/projects/video", headers=submit).status_code == 403
    for key in (own, other, submit):
        assert client.put("/v1/projects/video", json={"credentials": {}}, headers=key).status_code == 403
    assert put(json={"credentials": {}}).json()["credentials"] == {}


@pytest.mark.parametrize(
    ("credentials", "problem"),
    [
        ({"sets": {"prefixes": ["s3://a"], "secret": "wJalrXUtnFEMI/K7MDENG"}}, "must be file:/path or profile:NAME"),
        ({"sets": {"prefixes": ["s3://a"], "secret": {"key": "wJalrXUtnFEMI"}}}, "must be a valid string"),
        ({"sets": {"prefixes": ["s3://a"], "key": "k", "secret": "file:/a"}}, "unknown field"),
        ({"sets": {"prefixes": ["s3://a"], "secret": "wJalrXUtnFEMI" * 100}}, "at most 500 characters"),
        ({"sets": {"prefixes": [], "secret": "file:/a"}}, "at least 1 item"),
        ({"a.b": {"prefixes": ["s3://a"], "secret": "file:/a"}}, "must match pattern"),
        (
            {
                name: {"prefixes": [prefix], "secret": "file:/a"}
                for name, prefix in (("a", "s3://a/"), ("b", "s3a://a"))
            },
            "s3://a must be a prefix of one credential",
        ),
        ({f"n{n}": {"prefixes": [f"s3://{n}"], "secret": "file:/a"} for n in range(11)}, "at most 10 items"),
    ],
)
def test_invalid_storage_credentials_are_rejected_without_quoting_secrets(
    client: TestClient,
    admin: dict[str, str],
    credentials: dict[str, Any],
    problem: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rejected = client.put("/v1/projects/video", json={"credentials": credentials}, headers=admin)
    assert (rejected.status_code, rejected.json()["code"]) == (422, "request_invalid")
    assert problem in rejected.json()["detail"]
    assert "wJalrXUtnFEMI" not in rejected.text + caplog.text


def test_a_priority_above_the_maximum_is_rejected(
    client: TestClient, admin: dict[str, str], sqlite_engine: Engine
) -> None:
    ProjectStore(sqlite_engine).put("video", ProjectPolicy(max_priority=5), "test")
    request = {**JOB, "project": "video"}
    rejected = client.post("/v1/jobs", json={**request, "priority": 6}, headers=admin)
    assert (rejected.status_code, rejected.json()["code"]) == (409, "quota_exceeded")
    assert rejected.json()["detail"] == "priority=6: must be at most 5 in project video; lower it"
    job = client.post("/v1/jobs", json={**request, "priority": 5}, headers=admin).json()
    assert client.patch(f"/v1/jobs/{job['id']}", json={"priority": 7}, headers=admin).status_code == 409
    assert client.post("/v1/jobs", json={**JOB, "priority": 50}, headers=admin).status_code == 202, "another project"


@pytest.mark.parametrize(
    ("policy", "accepted", "rejected", "numbers"),
    [
        ({"max_deployments": 1}, {}, {}, {"needed": 1, "used": 1, "limit": 1}),
        (
            {"max_replicas": 4},
            {"replicas": {"min": 0, "max": 3}},
            {"replicas": {"min": 0, "max": 2}},
            {"needed": 2, "used": 3, "limit": 4},
        ),
        (
            {"max_gpus": 4},
            {"gpus": 0.5, "replicas": {"min": 1, "max": 2}},
            {"gpus": 1},
            {"needed": 1, "used": 4, "limit": 4},
        ),
    ],
)
def test_deployments_beyond_a_quota_are_rejected_with_the_numbers(
    client: TestClient,
    admin: dict[str, str],
    sqlite_engine: Engine,
    policy: dict[str, Any],
    accepted: dict[str, Any],
    rejected: dict[str, Any],
    numbers: dict[str, float],
) -> None:
    ProjectStore(sqlite_engine).put("video", ProjectPolicy(**policy), "test")
    encoder = index_encoder(sqlite_engine, "encoder", "video")
    running = queued(JobStore(sqlite_engine), project="video", state="running", attempt=1)
    attempt(sqlite_engine, running, gpus=3.0, ended_at=None)
    request = {"encoder": encoder, "project": "video"}
    for _ in range(2):  # an update does not count twice
        assert client.put("/v1/deployments/first", json={**request, **accepted}, headers=admin).status_code == 202
    response = client.put("/v1/deployments/second", json={**request, **rejected}, headers=admin)
    assert (response.status_code, response.json()["code"]) == (409, "quota_exceeded")
    assert numbers.items() <= response.json().items()
    assert next(iter(policy)) in response.json()["detail"]
    assert client.get("/v1/deployments/second", headers=admin).status_code == 404
    lowered = dict.fromkeys(policy, 0)
    ProjectStore(sqlite_engine).put("video", ProjectPolicy(**lowered), "test")
    assert client.put("/v1/deployments/first", json={**request, **accepted}, headers=admin).status_code == 202


def test_a_project_reports_the_resources_that_its_jobs_and_deployments_hold(
    client: TestClient, admin: dict[str, str], sqlite_engine: Engine
) -> None:
    store, encoder = JobStore(sqlite_engine), index_encoder(sqlite_engine, "encoder", "video")
    ProjectStore(sqlite_engine).put("video", ProjectPolicy(), "test")
    for number, state in enumerate(("running", "pausing", "failed", "queued")):
        job = queued(store, project="video", state=state, attempt=2, workers=3)
        for attempt_number in (1, 2):
            ended_at = None if attempt_number == 2 and state in ("running", "pausing") else 1.0
            attempt(sqlite_engine, job, attempt_number, gpus=1.0 + number, ended_at=ended_at)
    queued(store, project="audio", state="running", workers=8)
    queued(store, project="video", state="running", workers=8, origin="external")
    request = {"encoder": encoder, "project": "video", "gpus": 0.5, "replicas": {"min": 0, "max": 3}}
    assert client.put("/v1/deployments/digits", json=request, headers=admin).status_code == 202
    held = {"running_jobs": 2, "workers": 6, "gpus": 1.0 + 2.0 + 1.5, "deployments": 1, "replicas": 3}
    assert client.get("/v1/projects/video", headers=admin).json()["in_use"] == held
    (listed,) = client.get("/v1/projects", headers=admin).json()["items"]
    assert listed["in_use"] == held


def test_usage_counts_what_attempts_reserved_within_the_period(engine: Engine) -> None:
    store, usage = JobStore(engine), UsageStore(engine)
    job = queued(store, project="a", created_by="alice")
    attempt(engine, job, 1)
    attempt(engine, job, 2, started_at=3 * HOUR_S, ended_at=None, gpus=2.0)
    sweep = queued(store, project="a", kind="search", created_by="bob")
    attempt(engine, sweep)
    other = queued(store, project="b", created_by="alice", state="deleted")
    attempt(engine, other, started_at=HOUR_S)
    assert usage.by_project(0.0, 10 * HOUR_S) == {"a": (4 * (2 + 7 + 2), 2 + 14 + 2), "b": (4, 1)}
    assert usage.by_project(HOUR_S, 1.5 * HOUR_S) == {"a": (4.0, 1.0), "b": (2.0, 0.5)}
    assert usage.by_project(20 * HOUR_S, 21 * HOUR_S) == {"a": (4.0, 2.0)}
    assert [(row.key, row.hours.gpus) for row in usage.rows("user", 0.0, 10 * HOUR_S)] == [
        ("alice", 16.0),
        ("bob", 2.0),
        ("alice", 1.0),
    ]
    assert [(row.key, row.jobs) for row in usage.rows("sweep", 0.0, 10 * HOUR_S)] == [(sweep.id, 1)]
    assert [row.key for row in usage.rows("job", 0.0, 10 * HOUR_S, "b")] == [other.id]


def test_usage_is_reported_by_project_and_limited_to_the_callers_project(
    client: TestClient, admin: dict[str, str], sqlite_engine: Engine
) -> None:
    now = time.time()
    for project, hours in (("a", 2), ("b", 1)):
        job = queued(JobStore(sqlite_engine), project=project, attempt=1)
        attempt(sqlite_engine, job, started_at=now - hours * HOUR_S, ended_at=now)
    since = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
    found = client.get("/v1/usage", params={"since": since, "limit": 1}, headers=admin).json()
    assert [(row["key"], round(row["gpu_hours"], 2), row["jobs"]) for row in found["items"]] == [("a", 2.0, 1)]
    assert round(found["cpu_hours"], 1) == 12.0, "the total includes items beyond the limit"
    own = client.get("/v1/usage", params={"since": since}, headers=key_to(sqlite_engine, "read", project="b")).json()
    assert [row["key"] for row in own["items"]] == ["b"]
    detail = client.get(f"/v1/jobs/{job.id}", headers=admin).json()
    assert round(detail["gpu_hours"], 2) == 1.0


def test_months_start_in_utc() -> None:
    at = datetime(2026, 3, 31, 23, 59, tzinfo=UTC).timestamp()
    assert start_of_month(at) == datetime(2026, 3, 1, tzinfo=UTC).timestamp()


def test_changes_are_listed_in_pages_and_filtered(
    client: TestClient, admin: dict[str, str], sqlite_engine: Engine
) -> None:
    jobs = [client.post("/v1/jobs", json={**JOB, "project": "video"}, headers=admin).json()["id"] for _ in range(2)]
    client.post(f"/v1/jobs/{jobs[0]}/cancel", headers=admin)
    first = client.get("/v1/audit", params={"limit": 2}, headers=admin).json()
    second = client.get("/v1/audit", params={"limit": 2, "cursor": first["next_cursor"]}, headers=admin).json()
    found = [(entry["action"], entry["target"], entry["outcome"]) for entry in first["items"] + second["items"]]
    submitted = [("job.submit", job, "queued") for job in reversed(jobs)]
    assert found == [("job.cancel", jobs[0], "cancelled"), *submitted]
    assert second["next_cursor"] is None
    assert {entry["actor"] for entry in first["items"]} == {admin["Authorization"].split("_")[1]}
    of_target = client.get("/v1/audit", params={"target": jobs[1]}, headers=admin).json()["items"]
    assert [entry["action"] for entry in of_target] == ["job.submit"]
    of_action = client.get("/v1/audit", params={"action": "job.cancel"}, headers=admin).json()["items"]
    assert [entry["target"] for entry in of_action] == [jobs[0]]
    assert len(client.get("/v1/audit", params={"action": "job"}, headers=admin).json()["items"]) == 3
    assert client.get("/v1/audit", params={"action": "jo"}, headers=admin).json()["items"] == []
    assert client.get("/v1/audit", params={"action": "job%"}, headers=admin).status_code == 422
    after = datetime.now(UTC).isoformat()
    assert client.get("/v1/audit", params={"since": after}, headers=admin).json()["items"] == []
    other = key_to(sqlite_engine, "admin", project="audio")
    assert client.get("/v1/audit", headers=other).json()["items"] == []
