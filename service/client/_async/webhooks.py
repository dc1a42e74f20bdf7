"""Methods for webhooks: `client.webhooks`."""

from __future__ import annotations

from service.client._async.requests import AsyncApiMethods
from service.client.messages import api_path, fields_of
from service.webhooks.routes import DeliveryList, DeliveryView, NewWebhookView, WebhookList, WebhookRequest, WebhookView


class AsyncWebhooks(AsyncApiMethods):
    async def create(self, request: WebhookRequest) -> NewWebhookView:
        """Deliver future job events to a URL. Only this response contains the signing secret.

        Never retried once sent, because a lost response would leave a webhook whose secret is unknown.
        """
        return await self._request("POST", api_path("webhooks"), NewWebhookView, body=fields_of(request))

    async def delete(self, webhook_id: str) -> None:
        """Delete a webhook and its pending deliveries."""
        await self._send("DELETE", api_path("webhooks", webhook_id))

    async def deliveries(self, webhook_id: str, limit: int | None = None) -> list[DeliveryView]:
        """List the latest deliveries, newest first. The service chooses the default `limit`."""
        path = api_path("webhooks", webhook_id, "deliveries")
        return (await self._request("GET", path, DeliveryList, query={"limit": limit})).items

    async def test(self, webhook_id: str) -> DeliveryView:
        """Send a signed event of type `ping`. `deliveries` shows its outcome."""
        return await self._request("POST", api_path("webhooks", webhook_id, "test"), DeliveryView)

    async def redeliver(self, webhook_id: str, delivery_id: int) -> DeliveryView:
        """Send a delivery again immediately, with the same `webhook-id`."""
        path = api_path("webhooks", webhook_id, "deliveries", str(delivery_id), "redeliver")
        return await self._request("POST", path, DeliveryView, repeatable=True)

    async def list(self) -> list[WebhookView]:
        return (await self._request("GET", api_path("webhooks"), WebhookList)).items
