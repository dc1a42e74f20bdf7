"""Webhooks and their deliveries in the database.

A delivery is written in the transaction of its event. Nothing reads events up to some position, so none is lost that
commits late, and none is sent whose change was rolled back; that holds with any number of replicas. A try is claimed
by counting it, compare-and-set, before it is made: two senders never make the same one, and a sender that dies in the
middle has used up a try. A receiver may see a delivery twice (it answered, and we died): `webhook-id` tells.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import CursorResult, Engine, delete, func, or_, select, update
from sqlalchemy.orm import Session

from service.db.models import Delivery, Job, JobEvent, Webhook
from service.web.errors import NotFound

WAITING, TAKEN, GIVEN_UP = "waiting", "taken", "given_up"
MINUTE, HOUR = 60, 3600
# After each try that fails: a day in all, then the delivery is given up.
PAUSES_S = (5, 30, 2 * MINUTE, 10 * MINUTE, 30 * MINUTE, HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, 8 * HOUR)
KEPT_S = 7 * 24 * HOUR  # deliveries that have ended


def deliveries_for(session: Session, job: Job, event: JobEvent) -> None:
    """What this event owes to webhooks, for the session that writes it."""
    # The lock keeps a webhook from being deleted until the event is committed, which would make the event fail.
    listening = select(Webhook).where(or_(Webhook.project.is_(None), Webhook.project == job.project))
    for webhook in session.scalars(listening.with_for_update(read=True, key_share=True)):
        if not webhook.events or event.type in webhook.events:
            session.add(
                Delivery(
                    webhook_id=webhook.id,
                    job_id=job.id,
                    version=event.version,
                    body=_body(job, event),
                    state=WAITING,
                    tries=0,
                    not_before=event.at,
                    answer="",
                    created_at=event.at,
                    tried_at=None,
                )
            )


def _body(job: Job, event: JobEvent) -> dict[str, Any]:
    return {
        "type": f"job.{event.type}",
        "timestamp": datetime.fromtimestamp(event.at, UTC).isoformat(),
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


class Try(NamedTuple):
    """One claimed try of a delivery, with all that sending it needs."""

    delivery: int
    number: int
    """From 1."""
    message_id: str
    url: str
    secret: str
    body: dict[str, Any]

    @property
    def is_last(self) -> bool:
        return self.number > len(PAUSES_S)


class WebhookStore:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    # For their owners

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
        return webhook

    def of_project(self, project: str | None) -> Sequence[Webhook]:
        """Those of a project; none: all. Newest first."""
        query = select(Webhook).order_by(Webhook.created_at.desc(), Webhook.id)
        if project is not None:
            query = query.where(Webhook.project == project)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def delete(self, webhook_id: str, project: str | None) -> None:
        """With its deliveries, sent or not. Raises NotFound, also for one of another project."""
        with Session(self._engine) as session, session.begin():
            session.delete(_of(session, webhook_id, project))

    def deliveries(self, webhook_id: str, project: str | None, limit: int) -> Sequence[Delivery]:
        """The last ones, newest first. Raises NotFound."""
        with Session(self._reading, expire_on_commit=False) as session:
            _of(session, webhook_id, project)
            query = select(Delivery).where(Delivery.webhook_id == webhook_id)
            return list(session.scalars(query.order_by(Delivery.id.desc()).limit(limit)))

    # For the sender

    def claim(self, now: float, webhooks: int, each: int) -> list[Try]:
        """Tries that are due, now this caller's to make: of so many webhooks, those that have waited longest, and so
        many of each, so that one that does not answer is not in the way of the others."""
        due = (Delivery.state == WAITING, Delivery.not_before <= now)
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
        return [_try(delivery, webhook) for mine, delivery, webhook in claimed if mine]

    def _claim(self, delivery: Delivery, now: float) -> bool:
        if delivery.tries > len(PAUSES_S):  # whoever made the last try died over it
            self._set(delivery.id, delivery.tries, state=GIVEN_UP)
            return False
        pause = PAUSES_S[min(delivery.tries, len(PAUSES_S) - 1)]
        return self._set(delivery.id, delivery.tries, tries=delivery.tries + 1, tried_at=now, not_before=now + pause)

    def settle(self, made: Try, taken: bool, answer: str) -> None:
        """What a claimed try came to."""
        state = TAKEN if taken else GIVEN_UP if made.is_last else WAITING
        self._set(made.delivery, made.number, state=state, answer=answer)

    def _set(self, delivery: int, seen: int, **values: Any) -> bool:
        """If it still waits, with as many tries as were seen; whether it did."""
        unchanged = (Delivery.id == delivery, Delivery.state == WAITING, Delivery.tries == seen)
        with Session(self._engine) as session, session.begin():
            result = session.execute(update(Delivery).where(*unchanged).values(**values))
            assert isinstance(result, CursorResult)
            return result.rowcount == 1

    def forget(self, now: float) -> None:
        """Deliveries that ended long ago."""
        old = (Delivery.state.in_((TAKEN, GIVEN_UP)), Delivery.not_before < now - KEPT_S)
        with Session(self._engine) as session, session.begin():
            session.execute(delete(Delivery).where(*old))


def _of(session: Session, webhook_id: str, project: str | None) -> Webhook:
    webhook = session.get(Webhook, webhook_id)
    if webhook is None or (project is not None and webhook.project != project):
        raise NotFound(f"there is no webhook {webhook_id!r}")
    return webhook


def _try(delivery: Delivery, webhook: Webhook) -> Try:
    # Not the row's number, which a database may give again, and without the full stops that part what is signed.
    message_id = f"msg_{webhook.id}_{delivery.job_id}_{delivery.version}".replace(".", "_")
    return Try(delivery.id, delivery.tries + 1, message_id, webhook.url, webhook.secret, delivery.body)
