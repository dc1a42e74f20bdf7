"""Webhooks: deliver job events over HTTP. Deliveries are queued together with the event and retried for a day."""
