"""Methods for webhooks: `client.webhooks`."""

from __future__ import annotations

from service.client._async.requests import AsyncApiMethods
from service.webhooks.routes import DeliveryList, DeliveryView, NewWebhookView, WebhookList, WebhookRequest, WebhookView


class AsyncWebhooks(AsyncApiMethods):
    _resource = ("webhooks",)

    async def create(self, request: WebhookRequest) -> NewWebhookView:
        """Deliver future job events to a URL. Only this response contains the signing secret.

        Never retried once sent, because a lost response would leave a webhook whose secret is unknown.
        """
        return await self._request("POST", NewWebhookView, body=request)

    async def delete(self, webhook_id: str) -> None:
        """Delete a webhook and its pending deliveries."""
        await self._send("DELETE", webhook_id)

    async def deliveries(self, webhook_id: str, limit: int | None = None) -> list[DeliveryView]:
        """List the latest deliveries, newest first. The service chooses the default `limit`."""
        return (await self._request("GET", DeliveryList, webhook_id, "deliveries", query={"limit": limit})).items

    async def test(self, webhook_id: str) -> DeliveryView:
        """Send a signed event of type `ping`. `deliveries` shows its outcome."""
        return await self._request("POST", DeliveryView, webhook_id, "test")

    async def redeliver(self, webhook_id: str, delivery_id: int) -> DeliveryView:
        """Send a delivery again immediately, with the same `webhook-id`."""
        segments = webhook_id, "deliveries", str(delivery_id), "redeliver"
        return await self._request("POST", DeliveryView, *segments, repeatable=True)

    async def list(self) -> list[WebhookView]:
        return (await self._request("GET", WebhookList)).items
