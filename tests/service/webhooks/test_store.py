"""Tests for webhook deliveries: exactly one per job event, despite concurrent commits, rollbacks and deletions."""

from __future__ import annotations

import datetime as dt
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db.engine import open_engine
from service.db.models import JobEvent, Webhook
from service.jobs.store import StaleJob
from service.webhooks.store import job_store, queue_deliveries
from tests.support.service.fake_cluster import queued
from tests.support.service.receivers import Receiver
from tests.support.service.webhooks import SettableClock, add_webhook, deliveries, loopback_sender, verified_body


def test_every_change_to_a_job_is_signed_and_delivered_once(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    store, webhook = job_store(engine), add_webhook(engine, receiver.url())
    job = queued(store, project="video", name="a", labels={"team": "x"})
    job = store.change(job, "starting", state="starting")
    store.change(job, "failed", actor="key", state="failed", reason="oom_gpu", message="too large")
    loopback_sender(engine, clock).step()
    loopback_sender(engine, clock).step()
    bodies = sorted(
        (verified_body(webhook.secret, each) for each in receiver.received), key=lambda body: body["data"]["version"]
    )
    assert [body["type"] for body in bodies] == ["job.created", "job.starting", "job.failed"]
    assert bodies[-1]["data"] == {
        "job_id": job.id,
        "version": 3,
        "project": "video",
        "kind": job.kind,
        "name": "a",
        "labels": {"team": "x"},
        "state": "failed",
        "reason": "oom_gpu",
        "message": "too large",
        "actor": "key",
    }
    assert dt.datetime.fromisoformat(bodies[-1]["timestamp"]).tzinfo is not None
    assert len({each.headers["webhook-id"] for each in receiver.received}) == 3
    assert {each.headers["content-type"] for each in receiver.received} == {"application/json"}
    assert {row.state for row in deliveries(engine)} == {"taken"}


def test_a_webhook_receives_only_events_that_match_its_project_and_types(engine: Engine) -> None:
    store = job_store(engine)
    ours = add_webhook(engine, "https://ours.example.com", project="ours")
    terminal = add_webhook(engine, "https://ends.example.com", "succeeded", "failed")
    for project in ("ours", "theirs"):
        job = queued(store, project=project)
        store.change(job, "succeeded", state="succeeded")
    queued_events = {(row.webhook_id, row.body["data"]["project"], row.body["type"]) for row in deliveries(engine)}
    assert queued_events == {
        (ours.id, "ours", "job.created"),
        (ours.id, "ours", "job.succeeded"),
        (terminal.id, "ours", "job.succeeded"),
        (terminal.id, "theirs", "job.succeeded"),
    }


def test_a_rolled_back_change_is_not_delivered(engine: Engine) -> None:
    store = job_store(engine)
    add_webhook(engine, "https://a.example.com")
    job = queued(store)
    store.change(job, "starting", state="starting")
    with pytest.raises(StaleJob):
        store.change(job, "cancel", wanted="cancel")
    assert [row.version for row in deliveries(engine)] == [1, 2]


def test_an_event_committed_after_later_events_were_sent_is_still_sent(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite allows one writer at a time, so events are committed in order")
    store = job_store(engine)
    add_webhook(engine, receiver.url())
    early = queued(store)
    loopback_sender(engine, clock).step()
    with store._write() as slow:
        late = JobEvent(job_id=early.id, version=2, at=early.created_at, type="starting", actor="service", data={})
        slow.add(late)
        queue_deliveries(slow, early, late)
        slow.flush()
        later = queued(store)
        loopback_sender(engine, clock).step()
        assert [json.loads(each.body)["data"]["job_id"] for each in receiver.received] == [early.id, later.id]
    loopback_sender(engine, clock).step()
    assert json.loads(receiver.received[-1].body)["type"] == "job.starting"


def test_deleting_a_webhook_while_a_job_is_submitted_does_not_fail_the_submission(
    engine: Engine, database_url: str
) -> None:
    webhook = add_webhook(engine, "https://a.example.com")
    other = open_engine(database_url)
    store = job_store(other)
    with ThreadPoolExecutor(1) as pool:
        with Session(engine) as session, session.begin():
            session.delete(session.get_one(Webhook, webhook.id))
            session.flush()
            insertion = pool.submit(queued, store)
        job = insertion.result()
    assert store.get(job.id).version == 1
    assert deliveries(engine) == []
    other.dispose()


def test_events_of_a_deleted_job_are_still_delivered(engine: Engine, receiver: Receiver, clock: SettableClock) -> None:
    store = job_store(engine)
    add_webhook(engine, receiver.url())
    store.finish_deletion(queued(store))
    loopback_sender(engine, clock).step()
    assert len(receiver.received) == 2, "the job was created and deleted"
