"""The `amd` command: assemble the subcommands, one module each, and report invalid input.

Each subcommand parses its arguments, calls one function of a package, and prints text, or JSON with --json.
Packages that need torch or Ray are imported inside the commands that use them, so `amd --help` and `amd presets` load
neither.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from amd.config import ConfigError
from amd.storage import StorageError
from service.cli.bench import app as bench_app
from service.cli.console import print_errors
from service.cli.data import prepare, validate
from service.cli.demo import demo
from service.cli.detect import detect
from service.cli.embed import embed
from service.cli.encoders import app as encoders_app
from service.cli.exit_codes import BAD_INPUT, SUCCESS
from service.cli.finetune import finetune
from service.cli.jobs import app as jobs_app
from service.cli.parity import parity
from service.cli.presets import presets
from service.cli.probe import probe
from service.cli.search import app as search_app
from service.cli.stack import down, status, up
from service.cli.train import train

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry unless the user enables it

app = typer.Typer(
    name="amd",
    help="Small vision encoders by Asymmetric Masked Distillation: pre-train, evaluate, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (train, finetune, detect, probe, embed, presets, prepare, validate, demo, parity, up, down, status):
    app.command()(_command)
for _name, _group in {"bench": bench_app, "encoders": encoders_app, "search": search_app, "jobs": jobs_app}.items():
    app.add_typer(_group, name=_name)


@app.callback(invoke_without_command=True)
def _version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(version("amd-service"))
        raise typer.Exit(SUCCESS)


def main() -> None:
    """Run the command. Invalid input is reported without a traceback, with exit code 2."""
    try:
        app()
    except ConfigError as error:
        _exit_on_bad_input(error.problems)
    except StorageError as error:
        _exit_on_bad_input([str(error)])


def _exit_on_bad_input(problems: Sequence[str]) -> NoReturn:
    print_errors(problems)
    if "--json" in sys.argv:
        print(json.dumps({"state": "invalid", "problems": list(problems)}))
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
