"""Helpers for webhook tests: a settable clock, a sender that accepts loopback URLs, and a signature check."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from service.db.models import Delivery, Webhook
from service.webhooks.sender import WebhookSender
from service.webhooks.store import WebhookStore
from tests.support.service.receivers import Received


class SettableClock:
    """A clock that tests can set."""

    def __init__(self) -> None:
        self.now = 4e9  # later than every time written with the real clock

    def __call__(self) -> float:
        return self.now


def loopback_sender(engine: Engine, clock: SettableClock, **more: Any) -> WebhookSender:
    """Create a sender that may send over plain HTTP to receivers on this machine."""
    return WebhookSender(engine, allow_http=True, allow_private=True, clock=clock, **more)


def add_webhook(engine: Engine, url: str, *events: str, project: str | None = None) -> Webhook:
    return WebhookStore(engine).add(url, project, events, "test")


def deliveries(engine: Engine) -> list[Delivery]:
    """Return all deliveries in the database, oldest first."""
    with Session(engine, expire_on_commit=False) as session:
        return list(session.scalars(select(Delivery).order_by(Delivery.id)))


def verified_body(secret: str, message: Received) -> dict[str, Any]:
    """Verify the signature as specified by Standard Webhooks, independently of our code, and return the body."""
    text = f"{message.headers['webhook-id']}.{message.headers['webhook-timestamp']}.".encode() + message.body
    key = base64.b64decode(secret.split("_", 1)[1])
    version, _, signature = message.headers["webhook-signature"].partition(",")
    assert version == "v1"
    assert base64.b64decode(signature) == hmac.digest(key, text, hashlib.sha256)
    body: dict[str, Any] = json.loads(message.body)
    return body
