"""Tests for the project event feed."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service.db.audit import record_change
from service.db.models import AuditEntry, JobEvent
from service.jobs.store import JobStore
from service.projects.activity import CHANGES, ActivityFeed, ActivityFilter
from service.projects.routes import router
from service.registry.store import EncoderStore
from service.web.pagination import cursor_of
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.service.apps import client_of, key_to
from tests.support.service.fake_cluster import queued


@pytest.fixture
def client(sqlite_engine: Engine) -> TestClient:
    return client_of(sqlite_engine, router)


def record(engine: Engine, action: str, target: str, project: str | None) -> None:
    with Session(engine) as session, session.begin():
        record_change(session, "alice", action, target, project, "updated")


def events(client: TestClient, headers: dict[str, str], **query: Any) -> list[tuple[str, str]]:
    """Return (type, target) of all events, read in pages of two."""
    found, cursor = list[tuple[str, str]](), None
    while True:
        page = client.get("/v1/events", params={**query, "limit": 2, "cursor": cursor}, headers=headers).json()
        assert len(page["items"]) <= 2
        found += [(event["type"], event["target"]) for event in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def test_job_events_and_changes_are_merged_newest_first_and_limited_to_a_project(
    sqlite_engine: Engine, client: TestClient
) -> None:
    store = JobStore(sqlite_engine)
    job = queued(store, project="a")
    encoder = index_encoder(sqlite_engine, "encoder", "a")
    EncoderStore(sqlite_engine).move_alias("a", "best", encoder, "alice")
    job = store.change(job, "failed", state="failed", reason="nan_loss", message="no")
    record(sqlite_engine, "deployment.put", "digits", "a")
    other = queued(store, project="b")
    record(sqlite_engine, "key.create", "abc", "a")  # not part of the feed
    expected = [("deployment.put", "digits"), ("job.failed", job.id), ("alias.move", "best"), ("job.created", job.id)]
    reader = key_to(sqlite_engine, "read", project="a")
    assert events(client, reader) == expected
    assert events(client, key_to(sqlite_engine, "read")) == [("job.created", other.id), *expected]
    assert events(client, key_to(sqlite_engine, "read"), project="b") == [("job.created", other.id)]
    failed = client.get("/v1/events", params={"type": "job.failed"}, headers=reader).json()["items"][0]
    assert (failed["project"], failed["version"], failed["actor"], failed["data"]["reason"]) == (
        "a",
        2,
        "service",
        "nan_loss",
    )
    moved = client.get("/v1/events", params={"type": "alias"}, headers=reader).json()["items"][0]
    assert (moved["version"], moved["actor"], moved["data"]) == (None, "alice", {"outcome": "encoder"})
    assert client.get("/v1/events", params={"project": "b"}, headers=reader).status_code == 403
    assert client.get("/v1/events", headers=key_to(sqlite_engine, "infer")).status_code == 403


def test_the_feed_is_filtered_by_type_and_time(sqlite_engine: Engine, client: TestClient) -> None:
    store = JobStore(sqlite_engine)
    job = store.change(queued(store), "failed", state="failed")
    record(sqlite_engine, "encoder.delete", "old", "default")
    reader = key_to(sqlite_engine, "read")
    created, failed, deleted = ("job.created", job.id), ("job.failed", job.id), ("encoder.delete", "old")
    for types, found in (
        (["job"], [failed, created]),
        (["job.created"], [created]),
        (["job.created", "encoder"], [deleted, created]),
        (["job", "job.failed"], [failed, created]),
        (["encoder.delete"], [deleted]),
        (["deployment"], []),
    ):
        assert events(client, reader, type=types) == found, types
    assert events(client, reader, since="2999-01-01T00:00:00Z") == []
    assert events(client, reader, since="2020-01-01T00:00:00Z") == [deleted, failed, created]
    for query in ({"type": "key"}, {"type": "job.x" * 20}, {"since": "5"}, {"limit": 201}, {"cursor": "x"}):
        assert client.get("/v1/events", params=query, headers=reader).status_code in (400, 422), query
    wrong = cursor_of(1.0, "jobs/1")
    assert client.get("/v1/events", params={"cursor": wrong}, headers=reader).json()["code"] == "cursor_invalid"


def test_events_at_the_same_time_are_listed_exactly_once(engine: Engine) -> None:
    """Many events have equal times because clocks are coarse. Runs on both databases."""
    store = JobStore(engine)
    for _ in range(3):
        store.change(queued(store), "failed", state="failed")
    for number in range(4):
        record(engine, CHANGES[number], f"object-{number}", "default")
    with Session(engine) as session, session.begin():
        session.execute(update(JobEvent).values(at=1000.0))
        session.execute(update(AuditEntry).values(at=1000.0))
    feed, found, cursor = ActivityFeed(engine), list[tuple[str, str, int | None]](), None
    for _ in range(20):
        page = feed.page(ActivityFilter(), cursor, 3)
        found += [(event.type, event.target, event.version) for event in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert len(found) == len(set(found)) == 10
