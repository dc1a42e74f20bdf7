"""`amd keys …`: create, list and revoke API keys for the service."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from amd.config import ConfigError, broken_rule
from service.cli.connection import connected, default_project
from service.cli.console import print_secret
from service.cli.ids import unique_id
from service.cli.listing import Listing, Output, Watch, print_service_list
from service.cli.options import AsJson
from service.cli.tables import Column
from service.cli.times import ago

if TYPE_CHECKING:
    from service.auth.api_keys import KeyView

app = typer.Typer(help="Create, list and revoke API keys for the service; requires an admin key.", no_args_is_help=True)

UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def _state(key: KeyView) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= datetime.now(UTC) else "active"


KEYS: Listing[KeyView] = Listing(
    columns=(
        Column("id", lambda key: key.id, wraps=False),
        Column("name", lambda key: key.name),
        Column("scopes", lambda key: ", ".join(key.scopes)),
        Column("project", lambda key: key.project or "all", drop=4),
        Column("state", _state, wraps=False),
        Column("used", lambda key: ago(key.used_at) if key.used_at else "never", wraps=False, drop=3),
        Column("expires", lambda key: f"{key.expires_at:%Y-%m-%d}" if key.expires_at else "never", wraps=False, drop=2),
        Column("created by", lambda key: key.created_by, drop=1),
    ),
    empty="no keys",
)


@app.command("list")
def list_command(output: Output = "table", watch: Watch = False, as_json: AsJson = False) -> None:
    """List API keys, including revoked and expired ones."""
    print_service_list(KEYS, lambda client: client.keys.list(), output, watch, as_json)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the person or program that uses the key.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope", "-s", help="Scope: infer, read, submit or admin; each includes those before it; default: read."
        ),
    ] = None,
    project: Annotated[
        str | None,
        typer.Option(
            help="Project that the key is limited to; default: the project of the context or of your key, if any."
        ),
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(help="Validity period, such as 12h, 30d or 8w; default: the key does not expire.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create an API key and print it on standard output. It is not shown again."""
    from service.auth.api_keys import KeyRequest

    values = {"name": name, "scopes": scope or ["read"], "project": default_project(project)}
    try:
        request = KeyRequest.model_validate({**values, "expires_at": _expiry(expires_in)})
    except ValidationError as error:
        raise ConfigError([f"--{found['loc'][0]}: {broken_rule(found)}" for found in error.errors()]) from None
    with connected(as_json) as client:
        created = client.keys.create(request)
    if as_json:
        print(created.model_dump_json())
        return
    limits = f"scopes {', '.join(created.scopes)}; project {created.project or 'all'}"
    print_secret(created.key, f"key {created.id} ({limits}); it is not shown again")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="ID of the key, or a prefix of the ID.")],
    as_json: AsJson = False,
) -> None:
    """Revoke an API key, immediately and permanently."""
    with connected(as_json) as client:
        id = unique_id(key, [found.id for found in client.keys.list()], "key", "amd keys list")
        client.keys.revoke(id)
    print(json.dumps({"id": id, "revoked": True}) if as_json else f"{id}: revoked")


def _expiry(text: str | None) -> datetime | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    if found is None:
        raise ConfigError([f"--expires-in {text}: must be a number with the unit h, d or w, such as 12h or 30d"])
    return datetime.now(UTC) + int(found[1]) * UNITS[found[2]]
