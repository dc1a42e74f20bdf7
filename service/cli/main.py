"""The `amd` command: assemble the subcommands, one module each, and report invalid input.

Each subcommand parses its arguments, calls one function of a package, and prints text, or JSON with --json.
Packages that need torch or Ray are imported inside the commands that use them, so `amd --help` and `amd presets` load
neither.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Annotated, NoReturn

import typer

from amd.config import ConfigError
from amd.storage import StorageError
from service.cli.bench import app as bench_app
from service.cli.command_groups import RootGroup
from service.cli.connection import selected_context
from service.cli.console import print_errors
from service.cli.contexts import app as contexts_app
from service.cli.contexts import context_names, login, logout
from service.cli.data import dataset, prepare, validate
from service.cli.demo import demo
from service.cli.deployments import app as deployments_app
from service.cli.doctor import doctor
from service.cli.embed import embed
from service.cli.encoders import app as encoders_app
from service.cli.exit_codes import BAD_INPUT, SUCCESS
from service.cli.gc import gc
from service.cli.jobs import app as jobs_app
from service.cli.keys import app as keys_app
from service.cli.open_console import console
from service.cli.parity import parity
from service.cli.presets import presets
from service.cli.probe import probe
from service.cli.projects import app as projects_app
from service.cli.projects import audit, usage
from service.cli.search import app as search_app
from service.cli.stack import down, status, up
from service.cli.train import detect, finetune, train
from service.cli.webhooks import app as webhooks_app

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry unless the user enables it

PANELS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Train": {
        "demo": demo,
        "presets": presets,
        "train": train,
        "finetune": finetune,
        "detect": detect,
        "search": search_app,
    },
    "Evaluate": {"probe": probe, "embed": embed, "parity": parity, "bench": bench_app},
    "Data": {"dataset": dataset, "validate": validate, "prepare": prepare},
    "Service": {
        "up": up,
        "status": status,
        "down": down,
        "doctor": doctor,
        "gc": gc,
        "console": console,
        "jobs": jobs_app,
        "encoders": encoders_app,
        "deployments": deployments_app,
    },
    "Access": {
        "login": login,
        "logout": logout,
        "contexts": contexts_app,
        "keys": keys_app,
        "webhooks": webhooks_app,
        "projects": projects_app,
        "usage": usage,
        "audit": audit,
    },
}
"""All commands, in the order and under the headings of `amd --help`."""


class _OrderedGroup(RootGroup):
    order = tuple(name for commands in PANELS.values() for name in commands)


app = typer.Typer(
    name="amd",
    cls=_OrderedGroup,
    help="Small vision encoders by Asymmetric Masked Distillation: pre-train, evaluate, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in PANELS.items():
    for _name, _command in _commands.items():
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, name=_name, rich_help_panel=_panel)
        else:
            app.command(_name, rich_help_panel=_panel)(_command)


@app.callback(invoke_without_command=True)
def _global_options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    context: Annotated[
        str | None,
        typer.Option(
            help="Service to use: a name from `amd contexts`; default: AMD_URL, AMD_CONTEXT or the current context.",
            autocompletion=context_names,
        ),
    ] = None,
) -> None:
    selected_context.set(context)
    if show_version:
        print(version("amd-service"))
        raise typer.Exit(SUCCESS)


def main() -> None:
    """Run the command. Invalid input is reported without a traceback, with exit code 2."""
    try:
        app(prog_name="amd")
    except ConfigError as error:
        _exit_on_bad_input(error.problems)
    except StorageError as error:
        _exit_on_bad_input([str(error)])


def _exit_on_bad_input(problems: Sequence[str]) -> NoReturn:
    print_errors(problems)
    if _wants_json(sys.argv):
        print(json.dumps({"state": "invalid", "problems": list(problems)}))
    sys.exit(BAD_INPUT)


def _wants_json(args: Sequence[str]) -> bool:
    return any(arg in ("--json", "--output=json") for arg in args) or any(
        pair in (("-o", "json"), ("--output", "json")) for pair in pairwise(args)
    )


if __name__ == "__main__":
    main()
