"""Terminal output of the `amd` command: a console for results, a console for messages, and a uniform format for errors.

Results go to standard output, progress and errors to standard error, so that `--json` output can be piped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import typer
from rich.console import Console

from service.cli.exit_codes import FAILURE

out = Console()
err = Console(stderr=True)


def print_plain(line: str, console: Console = out) -> None:
    """Print a line verbatim, without markup, highlighting or wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_progress(line: str) -> None:
    """Print a dimmed line to standard error."""
    err.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def print_secret(secret: str, note: str) -> None:
    """Print the secret on standard output, so that it can be piped to a file, and the note on standard error."""
    print_progress(note)
    print_plain(secret)


def print_errors(problems: Sequence[str]) -> None:
    """Print each problem to standard error on a separate line."""
    for problem in problems:
        print_plain(f"error: {problem}", err)


def fail(*problems: str, code: int = FAILURE) -> NoReturn:
    """Print the problems and exit with `code`."""
    print_errors(problems)
    raise typer.Exit(code)
