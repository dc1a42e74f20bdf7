"""Tests that every console form that changes something leaves an audit entry, as the same change over REST does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi.routing import iter_route_contexts
from sqlalchemy import Engine

from service.projects.audit import AuditFilter, AuditLog
from service.webhooks.store import WebhookStore
from tests.support.browser import scenes
from tests.support.browser.console_client import ConsoleClient
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import queued

CHANGE_NOTHING = {  # forms that only display a result
    *("/console/new/check", "/console/encoders/{encoder}/try", "/console/lab/masks"),
}
# Forms that call a REST handler whose audit entry tests/service/auth/test_authorization.py checks.
CALL_REST = {
    *("/console/retention/dry-run", "/console/retention/apply", "/console/webhooks/{webhook_id}/test"),
    "/console/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver",
    "/console/sweeps/{job_id}/trials/{number}/stop",
}
SESSIONS = {"/console/sign-in", "/console/sign-out"}  # open and end the caller's own session


class FormRule(NamedTuple):
    """A form's fields and the action in its audit entry."""

    action: str
    fields: Mapping[str, str] = {}


FORMS = {  # in this order, since later forms change what earlier ones have created
    "/console/new": FormRule("job.submit", {"kind": "train", "preset": "demo-image-amd"}),
    "/console/jobs/{job_id}/edit": FormRule("job.edit", {"name": "renamed"}),
    "/console/jobs/{job_id}/{action}": FormRule("job.cancel"),
    "/console/sweeps/{sweep}/trials/{number}/train": FormRule("job.submit"),
    "/console/encoders/{encoder}/alias": FormRule("alias.move", {"alias": "stable"}),
    "/console/aliases/{alias}/roll-back": FormRule("alias.move"),
    "/console/encoders/{encoder}/deploy": FormRule("deployment.put", {"name": "deployed"}),
    "/console/deployments/{name}/candidate": FormRule("deployment.put", {"candidate": "first"}),
    "/console/deployments/{name}/promote": FormRule("deployment.put"),
    "/console/deployments/{name}/withdraw": FormRule("deployment.put"),
    "/console/deployments/{name}/roll-back": FormRule("deployment.put", {"revision": "1"}),
    "/console/deployments/{name}/delete": FormRule("deployment.delete"),
    "/console/encoders/{encoder}/delete": FormRule("encoder.delete"),
    "/console/keys": FormRule("key.create", {"name": "new", "scope": "read"}),
    "/console/keys/{key_id}/revoke": FormRule("key.revoke"),
    "/console/webhooks": FormRule("webhook.create", {"url": "https://hooks.example.com"}),
    "/console/webhooks/{webhook_id}/delete": FormRule("webhook.delete"),
}


def test_every_console_form_is_listed(app: Any) -> None:
    served = {route.path for route in iter_route_contexts(app.routes) if "POST" in (route.methods or ())}
    listed = {path.replace("{sweep}", "{job_id}") for path in FORMS} | CHANGE_NOTHING | CALL_REST | SESSIONS
    assert {path for path in served if path.startswith("/console")} == listed


def test_every_form_that_changes_something_leaves_an_audit_entry(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    store = app.state.jobs
    scenes.add_sweep(store, app.state.settings.root, 0.0)
    for encoder in ("first", "second", "third"):
        index_encoder(database, encoder)
    for encoder in ("first", "second"):
        app.state.encoders.move_alias("default", "old", encoder, "test")
    names = {
        "job_id": queued(store).id,
        "action": "cancel",
        "sweep": scenes.SWEEP,
        "number": "0",
        "encoder": "third",
        "alias": "old",
        "name": "deployed",
        "key_id": key_to(database, "read")["Authorization"].split("_")[1],
        "webhook_id": WebhookStore(database).add("https://example.com", None, [], "test").id,
    }
    log = AuditLog(database)
    seen = {entry.id for entry in log.list(AuditFilter(), limit=200)[0]}
    for path, rule in FORMS.items():
        if path.endswith("/delete") and "encoders" in path:
            app.state.encoders.delete_alias("default", "stable", "test")  # an encoder in use is not deleted
        response = console.submit(path.format(**names), **rule.fields)
        assert response.status_code < 300, (path, response.text)
        entries = [entry for entry in log.list(AuditFilter(), limit=200)[0] if entry.actor != "test"]
        new = [entry.action for entry in entries if entry.id not in seen]
        assert new == [rule.action], path
        seen |= {entry.id for entry in entries}
