"""Tests for `amd projects`, `amd usage` and `amd audit` against a real control plane."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db.models import Attempt
from service.jobs.store import JobStore
from service.projects.storage import StoredBytesStore
from tests.support.service.fake_cluster import queued
from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]


def test_policy_values_can_be_changed_individually_and_removed(service: Server, amd: Command) -> None:
    assert amd("projects", "set", "video", "share=2", "max_gpus=16")[0] == 0
    stored = json.loads(amd("projects", "set", "video", "gpu_hours_per_month=500", "max_gpus=null", "--json")[1])
    assert (stored["share"], stored["max_gpus"], stored["gpu_hours_per_month"]) == (2.0, None, 500.0)
    assert json.loads(amd("projects", "show", "video", "--json")[1]) == stored
    _, out, _ = amd("projects", "list")
    assert "0.0 of 500" in out
    assert "hours of the current month (UTC)" in out


def test_storage_credentials_are_set_and_removed_by_name(service: Server, amd: Command) -> None:
    sets = ("credentials.sets.secret=file:/secrets/sets", "credentials.sets.prefixes=[s3://bucket/sets, s3://other]")
    raw = "credentials.raw={secret: profile:raw, prefixes: [s3://bucket/raw]}"
    assert amd("projects", "set", "video", *sets, "share=2")[0] == 0
    stored = json.loads(amd("projects", "set", "video", raw, "--json")[1])["credentials"]
    assert stored == {
        "sets": {"prefixes": ["s3://bucket/sets", "s3://other"], "secret": "file:/secrets/sets"},
        "raw": {"prefixes": ["s3://bucket/raw"], "secret": "profile:raw"},
    }
    shown = " ".join(amd("projects", "show", "video")[1].split())
    assert "credentials.sets file:/secrets/sets for s3://bucket/sets, s3://other" in shown
    removed = json.loads(amd("projects", "set", "video", "credentials.sets=null", "--json")[1])
    assert (list(removed["credentials"]), removed["share"]) == (["raw"], 2.0)
    assert (
        "credentials.raw.prefixes: required, but not set"
        in amd("projects", "set", "video", "credentials.raw.prefixes=null")[2]
    )
    code, _, err = amd("projects", "set", "video", "credentials.raw.secret=wJalrXUtnFEMI/K7MDENG")
    assert code == 2
    assert "must be file:/path or profile:NAME" in err
    assert "wJalrXUtnFEMI" not in err


def test_project_storage_is_shown_with_its_quota(service: Server, amd: Command, sqlite_engine: Engine) -> None:
    StoredBytesStore(sqlite_engine).replace({"video": 3 * 2**29}, 0.0)
    assert json.loads(amd("projects", "set", "video", "max_storage_gib=2", "--json")[1])["stored_gib"] == 1.5
    assert "1.5 of 2" in amd("projects", "list")[1]
    assert "1.5 GiB" in amd("projects", "show", "video")[1]


def test_invalid_policy_values_are_reported_by_name(service: Server, amd: Command) -> None:
    code, _, err = amd("projects", "set", "video", "share=0")
    assert code == 2
    assert "share: must be greater than 0" in err
    assert "unknown: unknown field" in amd("projects", "set", "video", "unknown=1")[2]
    assert "max_gpus: must be KEY=VALUE" in amd("projects", "set", "video", "max_gpus")[2]


def test_usage_is_shown_by_project_and_by_job(service: Server, amd: Command, sqlite_engine: Engine) -> None:
    now = time.time()
    job = queued(JobStore(sqlite_engine), project="video")
    times = {"started_at": now - 60, "ended_at": now - 60 + 3.6}
    with Session(sqlite_engine) as session, session.begin():
        reserved = {"cpus": 4000.0, "gpus": 1000.0, "state": "failed", "message": "", "submission_id": job.id}
        session.add(Attempt(job_id=job.id, number=1, **times, **reserved))
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now - 3600))
    _, out, _ = amd("usage", "--since", since)
    assert "total: 1.0 GPU-hours, 4.0 CPU-hours" in out
    found = json.loads(amd("usage", "--by", "job", "--since", since, "--json")[1])
    assert [row["key"] for row in found["items"]] == [job.id]
    assert amd("usage", "--by", "color")[0] == 2


def test_changes_are_listed_newest_first(service: Server, amd: Command) -> None:
    amd("projects", "set", "video", "share=2")
    amd("projects", "set", "video", "share=3")
    found = json.loads(amd("audit", "--target", "video", "--json")[1])
    assert [(entry["action"], entry["outcome"]) for entry in found] == [
        ("project.put", "updated"),
        ("project.put", "created"),
    ]
    _, out, _ = amd("audit", "--limit", "1")
    assert "updated" in out
    assert "created" not in out
