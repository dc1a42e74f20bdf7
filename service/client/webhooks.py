"""Client calls for webhooks."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import httpx

from service.client.methods import AsyncMethods, BlockingMethods, async_one, one, view
from service.client.transport import Call, Script, ignore_body, once
from service.webhooks.routes import (
    DeliveryList,
    DeliveryView,
    NewWebhookView,
    WebhookList,
    WebhookRequest,
    WebhookView,
)


def webhook_create(request: WebhookRequest) -> Script[NewWebhookView]:
    """Create a webhook; only this response contains its secret. Never retried, like the creation of a key."""
    return once(Call("POST", "/v1/webhooks", view(NewWebhookView), body=request.model_dump(mode="json")))


def webhook_list() -> Script[list[WebhookView]]:
    read: Callable[[httpx.Response], WebhookList] = view(WebhookList)
    return once(Call("GET", "/v1/webhooks", lambda response: read(response).items))


def webhook_deliveries(webhook_id: str, limit: int = 50) -> Script[list[DeliveryView]]:
    """List the latest deliveries, newest first."""
    read: Callable[[httpx.Response], DeliveryList] = view(DeliveryList)
    path = f"/v1/webhooks/{quote(webhook_id, safe='')}/deliveries"
    return once(Call("GET", path, lambda response: read(response).items, {"limit": limit}))


def webhook_delete(webhook_id: str) -> Script[None]:
    """Delete a webhook and its pending deliveries."""
    return once(Call("DELETE", f"/v1/webhooks/{quote(webhook_id, safe='')}", ignore_body))


class Webhooks(BlockingMethods):
    create = one(webhook_create)
    list = one(webhook_list)
    deliveries = one(webhook_deliveries)
    delete = one(webhook_delete)


class AsyncWebhooks(AsyncMethods):
    create = async_one(webhook_create)
    list = async_one(webhook_list)
    deliveries = async_one(webhook_deliveries)
    delete = async_one(webhook_delete)
