"""Tests for the webhook routes: creation, listing, deliveries, deletion, permissions and invalid requests."""

from __future__ import annotations

import base64

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db.models import Webhook
from service.projects.audit import AuditFilter, AuditLog
from service.settings import Settings
from service.webhooks.routes import router
from service.webhooks.store import WebhookStore, job_store
from tests.support.service.apps import client_of, key_to
from tests.support.service.fake_cluster import queued
from tests.support.service.receivers import Receiver, Reply
from tests.support.service.webhooks import SettableClock, add_webhook, deliveries, loopback_sender, verified_body


def test_a_webhook_can_be_created_listed_monitored_and_deleted(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    client = client_of(engine, router, settings=Settings(webhooks_http=True))
    admin = key_to(engine, "admin")
    created = client.post("/v1/webhooks", json={"url": "http://a.example.com/x", "events": ["failed"]}, headers=admin)
    assert created.status_code == 201
    assert created.headers["Cache-Control"] == "no-store"
    secret, webhook_id = created.json()["secret"], created.json()["id"]
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    listed = client.get("/v1/webhooks", headers=admin)
    assert [each["id"] for each in listed.json()["items"]] == [webhook_id]
    assert secret not in listed.text
    store = job_store(engine)
    job = store.change(queued(store), "failed", state="failed")
    with Session(engine) as session, session.begin():
        session.get_one(Webhook, webhook_id).url = receiver.url()
    receiver.reply = Reply(500)
    loopback_sender(engine, clock).step()
    (delivery,) = client.get(f"/v1/webhooks/{webhook_id}/deliveries", headers=admin).json()["items"]
    assert (delivery["job_id"], delivery["type"], delivery["state"], delivery["tries"]) == (
        job.id,
        "job.failed",
        "waiting",
        1,
    )
    assert delivery["answer"] == "responded with 500"
    assert delivery["next_try_at"] > delivery["tried_at"]
    verified_body(secret, receiver.received[0])
    assert client.delete(f"/v1/webhooks/{webhook_id}", headers=admin).status_code == 204
    assert client.delete(f"/v1/webhooks/{webhook_id}", headers=admin).status_code == 404
    assert deliveries(engine) == []


def test_webhooks_in_other_projects_are_not_visible(engine: Engine) -> None:
    client = client_of(engine, router)
    ours, theirs = key_to(engine, "admin", project="ours"), key_to(engine, "admin", project="theirs")
    created = client.post("/v1/webhooks", json={"url": "https://a.example.com"}, headers=theirs).json()
    assert created["project"] == "theirs"
    assert client.get("/v1/webhooks", headers=ours).json()["items"] == []
    assert client.get(f"/v1/webhooks/{created['id']}/deliveries", headers=ours).status_code == 404
    assert client.delete(f"/v1/webhooks/{created['id']}", headers=ours).status_code == 404
    other = client.post("/v1/webhooks", json={"url": "https://a.example.com", "project": "theirs"}, headers=ours)
    assert other.status_code == 403
    for scope in ("read", "submit"):
        header = key_to(engine, scope, project="theirs")
        assert client.get("/v1/webhooks", headers=header).status_code == 403
        assert client.post("/v1/webhooks", json={"url": "https://a.example.com"}, headers=header).status_code == 403


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example.com",
        "ftp://a.example.com",
        "https://",
        "https:///x",
        "a.example.com",
        "",
        "https://user:secret@a.example.com",
        "https://a.example.com/#x",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://169.254.169.254/latest/meta-data",
        "https://a.example.com:99999999/",
        "https://a\u0000b/",
        "https://" + "a" * 2000,
        "javascript:alert(1)",
        "file:///etc/passwd",
    ],
)
def test_creating_a_webhook_with_a_disallowed_url_is_rejected(engine: Engine, url: str) -> None:
    client = client_of(engine, router)
    response = client.post("/v1/webhooks", json={"url": url}, headers=key_to(engine, "admin"))
    assert response.status_code == 422
    assert response.json()["code"] in ("uri_not_allowed", "request_invalid")
    assert WebhookStore(engine).of_project(None) == []


def test_an_unknown_event_type_is_rejected(engine: Engine) -> None:
    client = client_of(engine, router)
    body = {"url": "https://a.example.com", "events": ["suceeded"]}
    assert client.post("/v1/webhooks", json=body, headers=key_to(engine, "admin")).status_code == 422


def test_a_test_event_is_signed_and_sent_regardless_of_the_webhooks_event_types(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    client, admin = client_of(engine, router), key_to(engine, "admin")
    webhook = add_webhook(engine, receiver.url(), "failed")
    queued_test = client.post(f"/v1/webhooks/{webhook.id}/test", headers=admin)
    assert queued_test.status_code == 202
    assert (queued_test.json()["type"], queued_test.json()["state"]) == ("ping", "waiting")
    assert client.post(f"/v1/webhooks/{webhook.id}/test", headers=admin).json()["id"] != queued_test.json()["id"]
    loopback_sender(engine, clock).step()
    body = verified_body(webhook.secret, receiver.received[0])
    assert (body["type"], body["data"]["webhook_id"]) == ("ping", webhook.id)
    assert len({message.headers["webhook-id"] for message in receiver.received}) == 2
    found = client.get(f"/v1/webhooks/{webhook.id}/deliveries", headers=admin).json()["items"]
    assert {(each["job_id"], each["version"], each["state"]) for each in found} == {(None, 0, "taken")}
    changes = AuditLog(engine).list(AuditFilter(action="webhook.test"))[0]
    assert [entry.target for entry in changes] == [webhook.id] * 2
    assert client.post("/v1/webhooks/wh_abc/test", headers=admin).status_code == 404


def test_a_redelivery_keeps_its_id_and_gets_a_full_set_of_attempts(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    client, admin = client_of(engine, router), key_to(engine, "admin")
    webhook, other = add_webhook(engine, receiver.url()), add_webhook(engine, receiver.url(), "failed")
    queued(job_store(engine))
    sender = loopback_sender(engine, clock)
    sender.step()
    (delivery,) = deliveries(engine)
    path = f"/v1/webhooks/{webhook.id}/deliveries/{delivery.id}/redeliver"
    receiver.reply = Reply(500)
    again = client.post(path, headers=admin)
    assert (again.status_code, again.json()["state"], again.json()["tries"]) == (202, "waiting", 0)
    sender.step()
    assert len({message.headers["webhook-id"] for message in receiver.received}) == 1 < len(receiver.received)
    sender.step()
    assert len(receiver.received) == 2, "the next attempt is not due yet"
    waiting = client.post(path, headers=admin).json()
    assert (waiting["state"], waiting["tries"]) == ("waiting", 1), "a waiting delivery keeps its attempts"
    sender.step()
    assert len(receiver.received) == 3
    for wrong in (f"{webhook.id}/deliveries/{delivery.id + 1}", f"{other.id}/deliveries/{delivery.id}"):
        assert client.post(f"/v1/webhooks/{wrong}/redeliver", headers=admin).status_code == 404
    for number in (0, 2**31, "x"):
        path = f"/v1/webhooks/{webhook.id}/deliveries/{number}/redeliver"
        assert client.post(path, headers=admin).status_code == 422
