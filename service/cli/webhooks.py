"""`amd webhooks …`: create, inspect, test and delete webhooks on the service."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from amd.config import ConfigError, broken_rule
from service.cli.connection import connected, default_project
from service.cli.console import out, print_secret
from service.cli.ids import unique_id
from service.cli.listing import Listing, Output, Watch, print_service_list
from service.cli.options import AsJson
from service.cli.tables import Column, facts_table
from service.cli.times import ago

if TYPE_CHECKING:
    from service.client import Client
    from service.webhooks.routes import DeliveryView, WebhookView

app = typer.Typer(help="Manage webhooks, which receive job events; requires an admin key.", no_args_is_help=True)

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="ID of the webhook, or a prefix of the ID.")]

WEBHOOKS: Listing[WebhookView] = Listing(
    columns=(
        Column("id", lambda webhook: webhook.id, wraps=False),
        Column("url", lambda webhook: webhook.url, narrow=30),
        Column("events", lambda webhook: ", ".join(webhook.events) or "all"),
        Column("project", lambda webhook: webhook.project or "all", drop=3),
        Column("created", lambda webhook: ago(webhook.created_at), wraps=False, drop=2),
        Column("by", lambda webhook: webhook.created_by, drop=1),
    ),
    empty="no webhooks",
)

DELIVERIES: Listing[DeliveryView] = Listing(
    columns=(
        Column("id", lambda delivery: str(delivery.id), wraps=False),
        Column("job", lambda delivery: delivery.job_id or "", wraps=False),
        Column("event", lambda delivery: delivery.type),
        Column("state", lambda delivery: delivery.state, wraps=False),
        Column("tries", lambda delivery: str(delivery.tries), wraps=False, drop=2),
        Column("outcome", lambda delivery: delivery.answer, narrow=20),
        Column("created", lambda delivery: ago(delivery.created_at), wraps=False, drop=1),
    ),
    empty="no deliveries",
)


@app.command("list")
def list_command(output: Output = "table", watch: Watch = False, as_json: AsJson = False) -> None:
    """List webhooks; their secrets are not shown."""
    print_service_list(WEBHOOKS, lambda client: client.webhooks.list(), output, watch, as_json)


@app.command()
def create(
    url: Annotated[str, typer.Argument(help="Delivery target: an https URL with a public address.")],
    event: Annotated[
        list[str] | None,
        typer.Option(
            "--event", "-e", help="Job event to deliver, such as succeeded; may be repeated; default: all events."
        ),
    ] = None,
    project: Annotated[
        str | None,
        typer.Option(
            help="Receive events from this project. Default: the current context's project or your key's, if any."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a webhook and print its signing secret on standard output. It is not shown again."""
    from service.webhooks.routes import WebhookRequest

    try:
        request = WebhookRequest.model_validate(
            {"url": url, "events": event or [], "project": default_project(project)}
        )
    except ValidationError as error:
        raise ConfigError([f"{found['loc'][0]}: {broken_rule(found)}" for found in error.errors()]) from None
    with connected(as_json) as client:
        created = client.webhooks.create(request)
    if as_json:
        print(created.model_dump_json())
        return
    events = ", ".join(created.events) or "all events"
    print_secret(created.secret, f"webhook {created.id} ({events}, {created.url}); the secret is not shown again")


@app.command()
def show(webhook: WebhookId, as_json: AsJson = False) -> None:
    """Show a webhook."""
    with connected(as_json) as client:
        found = _find(client, webhook)
    if as_json:
        print(found.model_dump_json())
        return
    facts = [
        ("id", found.id),
        ("url", found.url),
        ("events", ", ".join(found.events) or "all"),
        ("project", found.project or "all"),
        ("created", f"{ago(found.created_at)} by {found.created_by}"),
    ]
    out.print(facts_table(facts))


@app.command()
def deliveries(
    webhook: WebhookId,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=200, help="Maximum number of deliveries.")] = 50,
    output: Output = "table",
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """List the latest deliveries of a webhook, newest first; completed deliveries are kept for a week by default."""

    def fetch(client: Client) -> list[DeliveryView]:
        return client.webhooks.deliveries(_find(client, webhook).id, limit)

    print_service_list(DELIVERIES, fetch, output, watch, as_json)


@app.command("test")
def send_test(webhook: WebhookId, as_json: AsJson = False) -> None:
    """Send a signed test event of type ping; `amd webhooks deliveries` shows its outcome."""
    with connected(as_json) as client:
        _print_delivery(client.webhooks.test(_find(client, webhook).id), as_json)


@app.command()
def redeliver(
    webhook: WebhookId,
    delivery: Annotated[int, typer.Argument(min=1, help="ID of the delivery, as `amd webhooks deliveries` prints it.")],
    as_json: AsJson = False,
) -> None:
    """Send a delivery again immediately. If it was accepted or given up on, it is retried for a day, like a new one."""
    with connected(as_json) as client:
        _print_delivery(client.webhooks.redeliver(_find(client, webhook).id, delivery), as_json)


@app.command()
def delete(webhook: WebhookId, as_json: AsJson = False) -> None:
    """Delete a webhook and its pending deliveries."""
    with connected(as_json) as client:
        id = _find(client, webhook).id
        client.webhooks.delete(id)
    print(json.dumps({"id": id, "deleted": True}) if as_json else f"{id}: deleted")


def _print_delivery(delivery: DeliveryView, as_json: bool) -> None:
    print(delivery.model_dump_json() if as_json else f"delivery {delivery.id}: {delivery.type} queued")


def _find(client: Client, text: str) -> WebhookView:
    webhooks = {webhook.id: webhook for webhook in client.webhooks.list()}
    return webhooks[unique_id(text, webhooks, "webhook", "amd webhooks list")]
