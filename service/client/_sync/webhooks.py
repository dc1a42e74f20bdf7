# Generated from service/client/_async/webhooks.py by `python -m tests.support.blocking_client`; do not edit.
"""Methods for webhooks: `client.webhooks`."""

from __future__ import annotations

from service.client._sync.requests import ApiMethods
from service.client.messages import api_path, fields_of
from service.webhooks.routes import DeliveryList, DeliveryView, NewWebhookView, WebhookList, WebhookRequest, WebhookView


class Webhooks(ApiMethods):
    def create(self, request: WebhookRequest) -> NewWebhookView:
        """Deliver future job events to a URL. Only this response contains the signing secret.

        Never retried once sent, because a lost response would leave a webhook whose secret is unknown.
        """
        return self._request("POST", api_path("webhooks"), NewWebhookView, body=fields_of(request))

    def delete(self, webhook_id: str) -> None:
        """Delete a webhook and its pending deliveries."""
        self._send("DELETE", api_path("webhooks", webhook_id))

    def deliveries(self, webhook_id: str, limit: int | None = None) -> list[DeliveryView]:
        """List the latest deliveries, newest first. The service chooses the default `limit`."""
        path = api_path("webhooks", webhook_id, "deliveries")
        return (self._request("GET", path, DeliveryList, query={"limit": limit})).items

    def test(self, webhook_id: str) -> DeliveryView:
        """Send a signed event of type `ping`. `deliveries` shows its outcome."""
        return self._request("POST", api_path("webhooks", webhook_id, "test"), DeliveryView)

    def redeliver(self, webhook_id: str, delivery_id: int) -> DeliveryView:
        """Send a delivery again immediately, with the same `webhook-id`."""
        path = api_path("webhooks", webhook_id, "deliveries", str(delivery_id), "redeliver")
        return self._request("POST", path, DeliveryView, repeatable=True)

    def list(self) -> list[WebhookView]:
        return (self._request("GET", api_path("webhooks"), WebhookList)).items
