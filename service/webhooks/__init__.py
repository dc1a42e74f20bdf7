"""Webhooks: deliver job events over HTTP. Deliveries are queued with the event and retried until accepted."""
