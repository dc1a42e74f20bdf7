"""`amd login`, `amd logout` and `amd contexts`: log in to services and choose the service that commands use."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import typer

from amd.config import ConfigError
from service.cli.command_groups import default_command
from service.cli.connection import ServiceTarget, connected_to, local_stack, read_key_file
from service.cli.console import fail, print_plain, print_progress
from service.cli.context_store import ServiceContext, contexts_path, read_contexts, write_contexts
from service.cli.listing import Listing, Output, Watch, chosen_format, print_list
from service.cli.options import AsJson
from service.cli.tables import Column
from service.web.hosts import is_loopback

LOCAL = "local"  # name of the context of a service on this machine
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

app = typer.Typer(
    cls=default_command("list"), help="List the services you are logged in to, and choose the current one."
)


def context_names() -> list[str]:
    try:
        return list(read_contexts().contexts)
    except ConfigError:  # reported when the command runs
        return []


Name = Annotated[str, typer.Argument(metavar="CONTEXT", help="Name of a context.", autocompletion=context_names)]


class NamedContext(NamedTuple):
    """A context with its name, as shown in listings."""

    name: str
    context: ServiceContext
    is_current: bool

    @property
    def key_source(self) -> str:
        return self.context.key_file or ("stored" if self.context.key else "none")

    def record(self) -> dict[str, Any]:
        """Return the context's fields, without the key."""
        facts = self.context.model_dump(exclude={"key"})
        return {"name": self.name, "current": self.is_current, **facts}


CONTEXTS: Listing[NamedContext] = Listing(
    columns=(
        Column("", lambda row: "*" if row.is_current else "", wraps=False),
        Column("context", lambda row: row.name),
        Column("url", lambda row: row.context.url, narrow=30),
        Column("project", lambda row: row.context.project or "", drop=2),
        Column("key", lambda row: row.key_source, drop=1),
    ),
    empty="no contexts; log in to a service with `amd login URL`",
    record=NamedContext.record,
)


def login(
    url: Annotated[
        str | None, typer.Argument(help="URL of the service; default: the service started by `amd up` on this machine.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", "-n", help=f"Name of the context; default: the host, or `{LOCAL}`.")
    ] = None,
    key_file: Annotated[
        str | None,
        typer.Option(help="File with the API key, read for each command; default: prompt, or read standard input."),
    ] = None,
    project: Annotated[str | None, typer.Option(help="Default value of --project for this service.")] = None,
    as_json: AsJson = False,
) -> None:
    """Log in to a service: check the API key, and store the URL and the key as the current context."""
    if url is None:
        stack = local_stack()
        if stack is None:
            fail("no service found on this machine: start one with `amd up`, or pass the URL of a service")
        url, key_file = stack.url, key_file or str(stack.key_file)
    url = _checked_url(url)
    name = name or _default_name(url)
    if not NAME.fullmatch(name):
        raise ConfigError([f"--name {name}: must start with a letter or digit and contain only letters, digits, . _ -"])
    if key_file is not None:
        key_file = str(Path(key_file).expanduser().absolute())
        context = ServiceContext(url=url, key_file=key_file, project=project)
        key = read_key_file(key_file, "--key-file ")
    else:
        key = _entered_key(url)
        context = ServiceContext(url=url, key=key, project=project)
    with connected_to(ServiceTarget(url, key, project, f"context {name}"), as_json) as client:
        next(client.jobs.list(project=project, page=1), None)
    write_contexts(read_contexts().with_context(name, context))
    if as_json:
        print(json.dumps(NamedContext(name, context, True).record()))
    else:
        print_plain(f"logged in to {url}; context {name}, stored in {contexts_path()}")
    _print_overriding_variables()


def logout(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONTEXT]",
            help="Context to log out of. Default: the current context.",
            autocompletion=context_names,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Delete a context and its stored API key. The key remains valid; `amd keys revoke` revokes it."""
    contexts = read_contexts()
    chosen = name or contexts.current
    if chosen is None:
        raise ConfigError(["no current context; pass the name of one: `amd contexts` lists them"])
    remaining = contexts.without(chosen)
    write_contexts(remaining)
    print(json.dumps({"deleted": chosen, "current": remaining.current}) if as_json else f"{chosen}: logged out")


@app.command("list")
def list_command(output: Output = "table", watch: Watch = False, as_json: AsJson = False) -> None:
    """List contexts; * marks the current one. Keys are not shown."""

    def fetch() -> list[NamedContext]:
        found = read_contexts()
        return [NamedContext(name, context, name == found.current) for name, context in found.contexts.items()]

    print_list(CONTEXTS, fetch, chosen_format(output, as_json), watch)


@app.command()
def use(name: Name, as_json: AsJson = False) -> None:
    """Make a context the current one."""
    contexts = read_contexts().with_current(name)
    write_contexts(contexts)
    url = contexts.get(name).url
    print(json.dumps({"current": name, "url": url}) if as_json else f"{name}: commands now use {url}")
    _print_overriding_variables()


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError([f"{url}: must be the URL of a service, such as https://amd.example.com"])
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        print_progress(f"{url}: the API key is sent unencrypted; use https outside a trusted network")
    return url.rstrip("/")


def _default_name(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return LOCAL if is_loopback(host) else host


def _entered_key(url: str) -> str:
    """Prompt for the key without echo, or read it from standard input if that is not a terminal."""
    text: str = (
        typer.prompt(f"API key for {url}", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read()
    )
    if not text.strip():
        raise ConfigError(["API key: empty; enter it, pipe it in, or pass --key-file"])
    return text.strip()


def _print_overriding_variables() -> None:
    for variable in ("AMD_URL", "AMD_CONTEXT"):
        if os.environ.get(variable):
            print_progress(f"{variable} is set in the environment and overrides the current context")
