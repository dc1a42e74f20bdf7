"""Webhooks over HTTP, for admins: made, listed, removed, and what became of their deliveries."""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from pydantic import ConfigDict, Field, StringConstraints

from service.auth.authentication import Admin
from service.db.models import Delivery, Webhook
from service.jobs.schemas import Action, Project, State, Wire
from service.web.errors import UriNotAllowed
from service.webhooks.addresses import NotAllowed, checked_url
from service.webhooks.store import WAITING, WebhookStore

EventType = Literal["created", "time_limit"] | State | Action


class WebhookRequest(Wire):
    """Where a project's job events are to be sent."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"url": "https://hooks.example.com/amd", "events": ["succeeded", "failed"], "project": "video"}
            ]
        }
    )

    url: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    """https, with a public address."""
    events: list[EventType] = Field(default_factory=list, max_length=40)
    """Types of job events, as in a job's history; none: all."""
    project: Project | None = None
    """null: your own; for a key of all projects: all."""


class WebhookView(Wire):
    id: str
    url: str
    events: list[str]
    project: str | None
    """null: all projects."""
    created_at: datetime
    created_by: str


class NewWebhookView(WebhookView):
    secret: str
    """Checks the signature of what arrives, as Standard Webhooks says. Shown here and never again."""


class WebhookList(Wire):
    items: list[WebhookView]


class DeliveryView(Wire):
    """One event on its way to a webhook."""

    job_id: str
    version: int
    """The event's number in the job's history."""
    type: str
    state: Literal["waiting", "taken", "given_up"]
    tries: int
    answer: str
    """What the last try came to."""
    created_at: datetime
    tried_at: datetime | None
    next_try_at: datetime | None


class DeliveryList(Wire):
    items: list[DeliveryView]


router = APIRouter(prefix="/webhooks", tags=["webhooks"])
WebhookId = Annotated[str, InPath(pattern=r"^wh_[0-9a-f]{1,29}$")]


@router.post("", status_code=HTTPStatus.CREATED)
def make_webhook(request: Request, caller: Admin, body: WebhookRequest, response: Response) -> NewWebhookView:
    """Send a project's job events to a URL from now on, signed, for a day until each is taken."""
    try:
        checked_url(body.url, allow_http=request.app.state.settings.webhooks_http)
    except NotAllowed as error:
        raise UriNotAllowed(f"url: {error}", field="url") from None
    response.headers["Cache-Control"] = "no-store"
    webhook = _webhooks(request).add(body.url, caller.own_project(body.project), body.events, caller.id)
    return NewWebhookView(**_view(webhook).model_dump(), secret=webhook.secret)


@router.get("")
def list_webhooks(request: Request, caller: Admin) -> WebhookList:
    """All webhooks; of your project where you have one."""
    return WebhookList(items=[_view(webhook) for webhook in _webhooks(request).of_project(caller.project)])


@router.delete("/{webhook_id}", status_code=HTTPStatus.NO_CONTENT)
def delete_webhook(request: Request, caller: Admin, webhook_id: WebhookId) -> None:
    """Send nothing more; what waits is dropped."""
    _webhooks(request).delete(webhook_id, caller.project)


@router.get("/{webhook_id}/deliveries")
def list_deliveries(
    request: Request, caller: Admin, webhook_id: WebhookId, limit: Annotated[int, Query(ge=1, le=200)] = 50
) -> DeliveryList:
    """The last deliveries, newest first; those that have ended are kept for a week."""
    found = _webhooks(request).deliveries(webhook_id, caller.project, limit)
    return DeliveryList(items=[_delivery_view(delivery) for delivery in found])


def _webhooks(request: Request) -> WebhookStore:
    return WebhookStore(request.app.state.engine)


def _view(webhook: Webhook) -> WebhookView:
    return WebhookView(
        id=webhook.id,
        url=webhook.url,
        events=webhook.events,
        project=webhook.project,
        created_at=datetime.fromtimestamp(webhook.created_at, UTC),
        created_by=webhook.created_by,
    )


def _delivery_view(delivery: Delivery) -> DeliveryView:
    return DeliveryView.model_validate(
        {
            "job_id": delivery.job_id,
            "version": delivery.version,
            "type": delivery.body["type"],
            "state": delivery.state,
            "tries": delivery.tries,
            "answer": delivery.answer,
            "created_at": delivery.created_at,
            "tried_at": delivery.tried_at,
            "next_try_at": delivery.not_before if delivery.state == WAITING else None,
        }
    )
