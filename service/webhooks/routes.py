"""Webhook routes, for admins: create, list, test and delete webhooks, and list and resend their deliveries."""

from __future__ import annotations

from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from pydantic import ConfigDict, Field, StringConstraints

from service.auth.authentication import Admin
from service.db.models import Delivery, Webhook
from service.jobs.schemas import Action, State
from service.web.errors import UriNotAllowed
from service.web.parameters import PageSize
from service.web.schemas import ApiModel, Project, utc_datetime
from service.webhooks.addresses import AddressNotAllowed, checked_url
from service.webhooks.store import PING, WAITING, WebhookStore

EventType = Literal["created", "edit", "time_limit", "preempt", "stop_trial"] | State | Action


class WebhookRequest(ApiModel):
    """Request to create a webhook."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"url": "https://hooks.example.com/amd", "events": ["succeeded", "failed"], "project": "video"}
            ]
        }
    )

    url: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    """URL to which events are delivered: an https URL whose host has a public address."""
    events: list[EventType] = Field(default_factory=list, max_length=40)
    """Types of job events to deliver, as in a job's history. Default: all types."""
    project: Project | None = None
    """Project whose events are delivered. Default: your key's project, or all projects if your key covers them all."""


class WebhookView(ApiModel):
    """A webhook without its secret."""

    id: str
    url: str
    events: list[str]
    project: str | None
    """Project whose events are delivered; null if the webhook covers all projects."""
    created_at: datetime
    created_by: str


class NewWebhookView(WebhookView):
    """A new webhook, with its secret."""

    secret: str
    """Secret for verifying signatures, as specified by Standard Webhooks. It is not shown again."""


class WebhookList(ApiModel):
    items: list[WebhookView]


class DeliveryView(ApiModel):
    """Delivery of one event to a webhook."""

    id: int
    job_id: str | None
    """ID of the job; null for a test."""
    version: int
    """Event number in the job's history; 0 for a test."""
    type: str
    """Type of the event, such as `job.failed`, or `ping` for a test."""
    state: Literal["waiting", "taken", "given_up"]
    tries: int
    answer: str
    """Outcome of the last attempt."""
    created_at: datetime
    tried_at: datetime | None
    next_try_at: datetime | None


class DeliveryList(ApiModel):
    items: list[DeliveryView]


router = APIRouter(prefix="/webhooks", tags=["webhooks"])
WebhookId = Annotated[str, InPath(pattern=r"^wh_[0-9a-f]{1,29}$", description="ID of the webhook.")]

DeliveryId = Annotated[int, InPath(ge=1, lt=2**31, description="ID of the delivery.")]


@router.post("", status_code=HTTPStatus.CREATED)
def create_webhook(request: Request, caller: Admin, body: WebhookRequest, response: Response) -> NewWebhookView:
    """Deliver a project's future job events to a URL. Deliveries are signed and retried for a day."""
    try:
        checked_url(body.url, allow_http=request.app.state.settings.webhooks_http)
    except AddressNotAllowed as error:
        raise UriNotAllowed(f"url: {error}", field="url") from None
    response.headers["Cache-Control"] = "no-store"
    webhook = _webhooks(request).add(body.url, caller.own_project(body.project), body.events, caller.id)
    return NewWebhookView(**_view(webhook).model_dump(), secret=webhook.secret)


@router.get("")
def list_webhooks(request: Request, caller: Admin) -> WebhookList:
    """List the webhooks in your key's project, or all webhooks if it covers all projects."""
    return WebhookList(items=[_view(webhook) for webhook in _webhooks(request).of_project(caller.project)])


@router.delete("/{webhook_id}", status_code=HTTPStatus.NO_CONTENT)
def delete_webhook(request: Request, caller: Admin, webhook_id: WebhookId) -> None:
    """Delete a webhook and its pending deliveries."""
    _webhooks(request).delete(webhook_id, caller.project, caller.id)


@router.get("/{webhook_id}/deliveries")
def list_deliveries(request: Request, caller: Admin, webhook_id: WebhookId, limit: PageSize = 50) -> DeliveryList:
    """List the latest deliveries, newest first. Finished deliveries are kept for a week by default."""
    found = _webhooks(request).deliveries(webhook_id, caller.project, limit)
    return DeliveryList(items=[_delivery_view(delivery) for delivery in found])


@router.post("/{webhook_id}/test", status_code=HTTPStatus.ACCEPTED)
def test_webhook(request: Request, caller: Admin, webhook_id: WebhookId) -> DeliveryView:
    """Send a signed event of type `ping`, regardless of which events the webhook receives.

    `GET /v1/webhooks/{webhook_id}/deliveries` shows its outcome.
    """
    return _delivery_view(_webhooks(request).add_test(webhook_id, caller.project, caller.id))


@router.post("/{webhook_id}/deliveries/{delivery_id}/redeliver", status_code=HTTPStatus.ACCEPTED)
def redeliver(request: Request, caller: Admin, webhook_id: WebhookId, delivery_id: DeliveryId) -> DeliveryView:
    """Send a delivery again, with the same `webhook-id`.

    A delivery that was accepted or given up is retried for a day, like a new delivery. For a waiting delivery, the next
    attempt is made immediately.
    """
    return _delivery_view(_webhooks(request).redeliver(webhook_id, delivery_id, caller.project, caller.id))


def _webhooks(request: Request) -> WebhookStore:
    return WebhookStore(request.app.state.engine)


def _view(webhook: Webhook) -> WebhookView:
    return WebhookView(
        id=webhook.id,
        url=webhook.url,
        events=webhook.events,
        project=webhook.project,
        created_at=utc_datetime(webhook.created_at),
        created_by=webhook.created_by,
    )


def _delivery_view(delivery: Delivery) -> DeliveryView:
    return DeliveryView.model_validate(
        {
            "id": delivery.id,
            "job_id": delivery.job_id if delivery.body["type"] != PING else None,
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
