"""Webhooks and their deliveries in the database.

A delivery is written in the same transaction as its event. No reader tracks a position in the events. Therefore, with
any number of replicas, an event that commits late is not lost, and an event whose change was rolled back is not sent.
An attempt is claimed before it is sent, by incrementing a counter with compare-and-set: two senders never send the same
attempt, and an attempt whose sender dies counts as failed. If a sender dies after the response, the receiver may get
the delivery twice; it can detect the duplicate by `webhook-id`.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import CursorResult, Engine, delete, func, or_, select, update
from sqlalchemy.orm import Session

from service.db.audit import record_change
from service.db.models import Delivery, Job, JobEvent, Webhook
from service.jobs.store import JobStore
from service.web.errors import NotFound
from service.web.schemas import utc_datetime

WAITING, TAKEN, GIVEN_UP = "waiting", "taken", "given_up"
PING = "ping"  # type of a test delivery
MINUTE, HOUR = 60, 3600
# Pause after each failed attempt; after about a day in total, the delivery is given up.
PAUSES_S = (5, 30, 2 * MINUTE, 10 * MINUTE, 30 * MINUTE, HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, 8 * HOUR)


def job_store(engine: Engine) -> JobStore:
    """Create a control plane's job store, in which every job event queues its webhook deliveries."""
    return JobStore(engine, queue_deliveries)


def queue_deliveries(session: Session, job: Job, event: JobEvent) -> None:
    """Add the event's deliveries to the session that writes the event."""
    # Without the lock, deleting a webhook before the event is committed would make the event fail.
    listening = select(Webhook).where(or_(Webhook.project.is_(None), Webhook.project == job.project))
    for webhook in session.scalars(listening.with_for_update(read=True, key_share=True)):
        if not webhook.events or event.type in webhook.events:
            session.add(_delivery(webhook.id, job.id, event.version, event.at, _body(job, event)))


def _delivery(webhook_id: str, job_id: str, version: int, at: float, body: dict[str, Any]) -> Delivery:
    return Delivery(
        webhook_id=webhook_id,
        job_id=job_id,
        version=version,
        body=body,
        state=WAITING,
        tries=0,
        not_before=at,
        answer="",
        created_at=at,
        tried_at=None,
    )


def _body(job: Job, event: JobEvent) -> dict[str, Any]:
    return {
        "type": f"job.{event.type}",
        "timestamp": utc_datetime(event.at).isoformat(),
        "data": {
            "job_id": job.id,
            "version": event.version,
            "project": job.project,
            "kind": job.kind,
            "name": job.name,
            "labels": job.labels,
            "state": job.state,
            "reason": job.reason,
            "message": job.message,
            "actor": event.actor,
        },
    }


class DeliveryAttempt(NamedTuple):
    """A claimed delivery attempt, with everything needed to send it."""

    delivery: int
    webhook: str
    """ID of the webhook."""
    number: int
    """Attempt number, starting at 1."""
    message_id: str
    url: str
    secret: str
    body: dict[str, Any]

    @property
    def is_last(self) -> bool:
        return self.number > len(PAUSES_S)


class WebhookStore:
    """Webhooks and their deliveries in the database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    # Management

    def add(self, url: str, project: str | None, events: Sequence[str], actor: str) -> Webhook:
        webhook = Webhook(
            id=f"wh_{secrets.token_hex(8)}",
            project=project,
            url=url,
            secret="whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
            events=sorted(set(events)),
            created_at=time.time(),
            created_by=actor,
        )
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            session.add(webhook)
            record_change(session, actor, "webhook.create", webhook.id, project, "created")
        return webhook

    def of_project(self, project: str | None) -> Sequence[Webhook]:
        """List the webhooks of a project, or of all projects if `project` is None, newest first."""
        query = select(Webhook).order_by(Webhook.created_at.desc(), Webhook.id)
        if project is not None:
            query = query.where(Webhook.project == project)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def delete(self, webhook_id: str, project: str | None, actor: str) -> None:
        """Delete a webhook with all its deliveries. Raises NotFound, including for a webhook in another project."""
        with Session(self._engine) as session, session.begin():
            webhook = _of(session, webhook_id, project)
            session.delete(webhook)
            record_change(session, actor, "webhook.delete", webhook_id, webhook.project, "deleted")

    def deliveries(self, webhook_id: str, project: str | None, limit: int) -> Sequence[Delivery]:
        """List a webhook's latest deliveries, newest first. Raises NotFound."""
        with Session(self._reading, expire_on_commit=False) as session:
            _of(session, webhook_id, project)
            query = select(Delivery).where(Delivery.webhook_id == webhook_id)
            return list(session.scalars(query.order_by(Delivery.id.desc()).limit(limit)))

    def add_test(self, webhook_id: str, project: str | None, actor: str) -> Delivery:
        """Queue a delivery of type `ping`, regardless of which events the webhook receives. Raises NotFound."""
        now = time.time()
        body = {
            "type": PING,
            "timestamp": utc_datetime(now).isoformat(),
            "data": {"webhook_id": webhook_id, "actor": actor},
        }
        delivery = _delivery(webhook_id, f"{PING}-{secrets.token_hex(8)}", 0, now, body)
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            webhook = _of(session, webhook_id, project)
            session.add(delivery)
            record_change(session, actor, "webhook.test", webhook_id, webhook.project, "queued")
        return delivery

    def redeliver(self, webhook_id: str, delivery_id: int, project: str | None, actor: str) -> Delivery:
        """Make a delivery due now. If it was accepted or given up, reset its attempt count. Raises NotFound."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            webhook = _of(session, webhook_id, project)
            delivery = session.get(Delivery, delivery_id, with_for_update=True)
            if delivery is None or delivery.webhook_id != webhook_id:
                raise NotFound(f"webhook {webhook_id!r} has no delivery {delivery_id}")
            if delivery.state != WAITING:
                delivery.state, delivery.tries = WAITING, 0
            delivery.not_before = time.time()
            record_change(session, actor, "webhook.redeliver", webhook_id, webhook.project, "queued")
        return delivery

    # Sending

    def claim(self, now: float, webhooks: int, each: int, busy: Collection[str] = ()) -> list[DeliveryAttempt]:
        """Claim due attempts of webhooks that are not busy, for the caller to send.

        Claims attempts for at most `webhooks` webhooks, longest waiting first, and at most `each` attempts per webhook,
        so that an unresponsive receiver does not block the others.
        """
        due = (Delivery.state == WAITING, Delivery.not_before <= now, Delivery.webhook_id.not_in(busy))
        first = func.min(Delivery.not_before)
        oldest = select(Delivery.webhook_id).where(*due).group_by(Delivery.webhook_id).order_by(first).limit(webhooks)
        with Session(self._reading, expire_on_commit=False) as session:
            found = [
                (delivery, webhook)
                for webhook in session.scalars(select(Webhook).where(Webhook.id.in_(session.scalars(oldest).all())))
                for delivery in session.scalars(
                    select(Delivery)
                    .where(Delivery.webhook_id == webhook.id, *due)
                    .order_by(Delivery.not_before, Delivery.id)
                    .limit(each)
                )
            ]
        claimed = ((self._claim(delivery, now), delivery, webhook) for delivery, webhook in found)
        return [_attempt(delivery, webhook) for is_claimed, delivery, webhook in claimed if is_claimed]

    def _claim(self, delivery: Delivery, now: float) -> bool:
        if delivery.tries > len(PAUSES_S):  # the sender of the last attempt died
            self._set(delivery.id, delivery.tries, state=GIVEN_UP)
            return False
        pause = PAUSES_S[min(delivery.tries, len(PAUSES_S) - 1)]
        return self._set(delivery.id, delivery.tries, tries=delivery.tries + 1, tried_at=now, not_before=now + pause)

    def record_result(self, claimed: DeliveryAttempt, accepted: bool, answer: str) -> None:
        """Record the result of a claimed attempt."""
        state = TAKEN if accepted else GIVEN_UP if claimed.is_last else WAITING
        self._set(claimed.delivery, claimed.number, state=state, answer=answer)

    def _set(self, delivery: int, expected_tries: int, **values: Any) -> bool:
        """Update a delivery if it is still waiting and its attempt count is unchanged. Returns whether it did so."""
        unchanged = (Delivery.id == delivery, Delivery.state == WAITING, Delivery.tries == expected_tries)
        with Session(self._engine) as session, session.begin():
            result = session.execute(update(Delivery).where(*unchanged).values(**values))
            assert isinstance(result, CursorResult)
            return result.rowcount == 1

    def purge(self, finished_before: float) -> None:
        """Delete the deliveries that finished before a time."""
        old = (Delivery.state.in_((TAKEN, GIVEN_UP)), Delivery.not_before < finished_before)
        with Session(self._engine) as session, session.begin():
            session.execute(delete(Delivery).where(*old))


def _of(session: Session, webhook_id: str, project: str | None) -> Webhook:
    webhook = session.get(Webhook, webhook_id)
    if webhook is None or (project is not None and webhook.project != project):
        raise NotFound(f"there is no webhook {webhook_id!r}")
    return webhook


def _attempt(delivery: Delivery, webhook: Webhook) -> DeliveryAttempt:
    # Contains neither the row's ID, which a database may reuse, nor dots, which separate the signed parts.
    message_id = f"msg_{webhook.id}_{delivery.job_id}_{delivery.version}".replace(".", "_")
    return DeliveryAttempt(
        delivery.id, webhook.id, delivery.tries + 1, message_id, webhook.url, webhook.secret, delivery.body
    )
