"""Webhooks: deliver job events by HTTP, queued with the event and retried until accepted."""
