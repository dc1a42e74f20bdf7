# Generated from service/client/_async/webhooks.py by `python -m tests.support.blocking_client`; do not edit.
"""Methods for webhooks: `client.webhooks`."""

from __future__ import annotations

from service.client._sync.requests import ApiMethods
from service.webhooks.routes import DeliveryList, DeliveryView, NewWebhookView, WebhookList, WebhookRequest, WebhookView


class Webhooks(ApiMethods):
    _resource = ("webhooks",)

    def create(self, request: WebhookRequest) -> NewWebhookView:
        """Deliver future job events to a URL. Only this response contains the signing secret.

        Never retried once sent, because a lost response would leave a webhook whose secret is unknown.
        """
        return self._request("POST", NewWebhookView, body=request)

    def delete(self, webhook_id: str) -> None:
        """Delete a webhook and its pending deliveries."""
        self._send("DELETE", webhook_id)

    def deliveries(self, webhook_id: str, limit: int | None = None) -> list[DeliveryView]:
        """List the latest deliveries, newest first. The service chooses the default `limit`."""
        return (self._request("GET", DeliveryList, webhook_id, "deliveries", query={"limit": limit})).items

    def test(self, webhook_id: str) -> DeliveryView:
        """Send a signed event of type `ping`. `deliveries` shows its outcome."""
        return self._request("POST", DeliveryView, webhook_id, "test")

    def redeliver(self, webhook_id: str, delivery_id: int) -> DeliveryView:
        """Send a delivery again immediately, with the same `webhook-id`."""
        segments = webhook_id, "deliveries", str(delivery_id), "redeliver"
        return self._request("POST", DeliveryView, *segments, repeatable=True)

    def list(self) -> list[WebhookView]:
        return (self._request("GET", WebhookList)).items
