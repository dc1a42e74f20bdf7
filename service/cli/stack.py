"""`amd up`, `amd down`, `amd status`: run the whole service on this machine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from service.cli.connection import configured_target, read_key_file
from service.cli.console import fail, out, print_plain, print_progress
from service.cli.exit_codes import FAILURE, SUCCESS
from service.cli.open_console import link_note, link_of_stack
from service.cli.options import AsJson
from service.cli.tables import Column, fitted_table

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder for the database, keys and logs; default: AMD_DATA_DIR, else ~/.local/share/amd-service.",
    ),
]

PARTS: tuple[Column[tuple[str, ...]], ...] = (
    Column("part", lambda row: row[0], wraps=False),
    Column("pid", lambda row: row[1], wraps=False, drop=1),
    Column("port", lambda row: row[2], wraps=False),
    Column("health", lambda row: row[3]),
)


def up(
    data_dir: DataDir = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="REST API port, or 0 for any free port; default: the previous port, else 8400."
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Storage root for runs and encoders: a path or fsspec URL; default: the previous one."),
    ] = None,
    num_cpus: Annotated[
        int | None,
        typer.Option("--num-cpus", min=1, help="Number of CPUs available to jobs; default: all CPUs of the machine."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            help="Folder or URI prefix from which jobs may read data and weights, besides the storage root and earlier "
            "ones; may be repeated; '' forgets the earlier ones.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start the service on this machine: Ray and the control plane, on loopback.

    Parts that are already running are not restarted, except for the control plane if --allow changes.
    """
    from service.stack import StackError
    from service.stack import up as start

    try:
        stack = start(
            data_dir,
            port=port,
            storage=storage,
            num_cpus=num_cpus,
            allowed=allow,
            supervise=True,
            on_progress=print_progress,
        )
    except StackError as error:
        fail(str(error))
    if as_json:
        print(json.dumps({"url": stack.url, "key_file": str(stack.key_file), "data_dir": str(stack.data_dir)}))
        return
    link = link_of_stack(stack.url, read_key_file(stack.key_file, "key file "))
    print_plain(f"AMD service  {stack.url}  (API: {stack.url}/docs)")
    print_plain(f"console      {link}")
    print_plain(f"             ({link_note()})")
    print_plain(f"key file     {stack.key_file}")
    print_plain(f"data         {stack.data_dir}")
    if stack.allowed:
        print_plain(f"jobs read    {', '.join(stack.allowed)}")
    data = f" data.train={shlex.quote(stack.allowed[-1])}" if stack.allowed else ""
    print_plain(f"next         amd train --preset demo-image-amd{data} --submit")
    other = configured_target()
    if other is not None and other.url != stack.url:
        print_progress(f"commands use {other}, not this service; `amd login` makes this service the current context")


def down(
    data_dir: DataDir = None,
    now: Annotated[bool, typer.Option("--now", help="Stop without waiting for the jobs' final checkpoints.")] = False,
) -> None:
    """Stop the service on this machine; its data is kept, and running jobs continue after the next `amd up`."""
    from service.stack import DRAIN_S, StackError
    from service.stack import down as stop

    try:
        was_running = stop(data_dir, drain_s=0.0 if now else DRAIN_S, on_progress=print_progress)
    except StackError as error:
        fail(str(error))
    out.print("stopped" if was_running else "nothing was running", highlight=False)


def status(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the state of the service on this machine; the exit code is 1 if any part is unhealthy."""
    from service.stack import StackError
    from service.stack import status as stack_status

    try:
        found = stack_status(data_dir)
    except StackError as error:
        fail(str(error))
    if as_json:
        parts = [part._asdict() for part in found.parts]
        print(json.dumps({**found._asdict(), "data_dir": str(found.data_dir), "parts": parts}))
    elif not found.parts:
        out.print(f"no stack in {found.data_dir}; start one with `amd up`", highlight=False, soft_wrap=True)
    else:
        rows: list[tuple[str, ...]] = [
            (part.name, str(part.pid or "–"), str(part.port), part.health) for part in found.parts
        ]
        rows += [(f"  {name}", "", "", health) for name, health in found.reports.items()]
        supervisor = "ok" if found.supervisor else "down: parts that die are not restarted; run `amd up`"
        rows.append(("supervisor", str(found.supervisor or "–"), "", supervisor))
        out.print(fitted_table(PARTS, rows, out.width))
        print_plain(f"{found.url}, data in {found.data_dir}")
    raise typer.Exit(SUCCESS if found.healthy else FAILURE)
