"""`amd console`: print a link that opens a service's web console and signs you in."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.connection import connected_to, service_target
from service.cli.console import print_plain, print_progress
from service.cli.options import AsJson

if TYPE_CHECKING:
    from service.client import Client


def link_note(amd: str = "amd") -> str:
    """Return a note on how long a console link works. `amd`: command with which the user starts this program."""
    return f"works once, within 10 minutes; `{amd} console` creates another one"


def command_prefix(data_dir: Path) -> str:
    """Return the command with which a user starts this program for the stack in a data directory."""
    command = "amd" if shutil.which("amd") else shlex.quote(sys.argv[0])
    return f"AMD_DATA_DIR={shlex.quote(str(data_dir))} {command}"


def console(
    browse: Annotated[bool, typer.Option("--open", help="Open the link in the default browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a link that opens the service's web console, signed in with your API key."""
    target = service_target()
    with connected_to(target, as_json) as client:
        link = console_link(client, target.url)
    if as_json:
        print(json.dumps({"url": link}))
    else:
        print_progress(f"{target}: the link {link_note()}")
        print_plain(link)
    if browse:
        webbrowser.open(link)


def link_of_stack(url: str, key: str) -> str:
    """Return a link that opens the console of a stack, or the console's URL if the key is no longer valid."""
    from service.client import ApiError, Client, NoAnswer

    try:
        with Client(url, key) as client:
            return console_link(client, url)
    except (ApiError, NoAnswer):
        return f"{url}/console"


def console_link(client: Client, url: str) -> str:
    """Return a single-use link that opens the console of the service at `url`."""
    return url.rstrip("/") + client.console_link().path
