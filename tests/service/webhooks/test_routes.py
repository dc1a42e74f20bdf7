"""Tests for the webhook routes: creation, listing, deliveries, deletion, permissions and invalid requests."""

from __future__ import annotations

import base64

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db.models import Webhook
from service.settings import Settings
from service.webhooks.routes import router
from service.webhooks.store import WebhookStore, job_store
from tests.support.service.apps import client_of, key_to
from tests.support.service.fake_cluster import queued
from tests.support.service.receivers import Receiver, Reply
from tests.support.service.webhooks import SettableClock, deliveries, loopback_sender, verified_body


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
