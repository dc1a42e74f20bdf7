"""`amd parity`: check this implementation against reference values recorded from the official code."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.console import print_plain
from service.cli.exit_codes import FAILURE, SUCCESS
from service.cli.options import AsJson


def parity(
    folder: Annotated[str, typer.Argument(help="Folder of reference values recorded from the official code.")],
    as_json: AsJson = False,
) -> None:
    """Compare results with values recorded from the official code; exit with code 1 if any difference is too large."""
    from amd.parity import run

    report = run(folder)
    if as_json:
        print(report.as_json())
    else:
        for line in report.lines():
            print_plain(line)
    raise typer.Exit(SUCCESS if report.ok else FAILURE)
