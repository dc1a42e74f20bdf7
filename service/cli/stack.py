"""`amd up`, `amd down`, `amd status`: the whole service on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from service.stack import StackError

out = Console()
err = Console(stderr=True)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Its database, keys and logs; default: AMD_DATA_DIR, else the user's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON at the end, for programs.")]


def up(
    data_dir: DataDir = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of the REST API; 0: any. Default: as last time, else 8400.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Root of runs and encoders, any fsspec URL; default: as last time.")
    ] = None,
    num_cpus: Annotated[
        int | None, typer.Option("--num-cpus", min=1, help="CPUs for jobs; default: the machine's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start the service on this machine, or what of it does not run: Ray and the control plane, on loopback."""
    from service.stack import StackError
    from service.stack import up as start

    try:
        stack = start(data_dir, port=port, storage=storage, num_cpus=num_cpus, say=_say)
    except StackError as error:
        _fail(error)
    if as_json:
        print(json.dumps({"url": stack.url, "key_file": str(stack.key_file), "data_dir": str(stack.data_dir)}))
        return
    for line in (
        f"AMD service  {stack.url}  (API: {stack.url}/docs)",
        f"key file     {stack.key_file}",
        f"data         {stack.data_dir}",
        "next         amd train --preset demo-image-amd --submit",
    ):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def down(
    data_dir: DataDir = None,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for last checkpoints of running jobs.")] = False,
) -> None:
    """Stop the service on this machine; its data stays, and running jobs go on after the next `amd up`."""
    from service.stack import DRAIN_S, StackError
    from service.stack import down as stop

    try:
        ran = stop(data_dir, drain_s=0.0 if now else DRAIN_S, say=_say)
    except StackError as error:
        _fail(error)
    out.print("stopped" if ran else "nothing was running", highlight=False)


def status(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """What of the service runs on this machine, and how it is; exit code 1 where a part is not well."""
    from service.stack import StackError
    from service.stack import status as look

    try:
        found = look(data_dir)
    except StackError as error:
        _fail(error)
    if as_json:
        parts = [part._asdict() for part in found.parts]
        print(json.dumps({**found._asdict(), "data_dir": str(found.data_dir), "parts": parts}))
    elif not found.parts:
        out.print(f"no stack in {found.data_dir}; start one with `amd up`", highlight=False, soft_wrap=True)
    else:
        table = Table(caption=f"{found.url}, data in {found.data_dir}")
        for column in ("part", "pid", "port", "health"):
            table.add_column(column)
        for part in found.parts:
            table.add_row(part.name, str(part.pid or "–"), str(part.port), part.health)
        for name, health in found.reports.items():
            table.add_row(f"  {name}", "", "", health)
        out.print(table)
    raise typer.Exit(0 if found.healthy else 1)


def _say(line: str) -> None:
    err.print(line, style="dim", markup=False, highlight=False)


def _fail(error: StackError) -> NoReturn:
    err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
