"""Options and output shared by all list commands: a table, JSON or YAML, printed once or repeatedly with `--watch`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import typer
import yaml
from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from amd.config import ConfigError
from service.cli.connection import connected
from service.cli.console import out
from service.cli.tables import Column, fitted_table

if TYPE_CHECKING:
    from service.client import Client

T = TypeVar("T")

OutputFormat = Literal["table", "json", "yaml"]
Output = Annotated[OutputFormat, typer.Option("--output", "-o", help="Output format; --json is short for -o json.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Refresh the list until Ctrl-C.")]

WATCH_INTERVAL_S = 2.0


def chosen_format(output: OutputFormat, as_json: bool) -> OutputFormat:
    """Combine --output and --json. Raises ConfigError if they conflict."""
    if as_json and output == "yaml":
        raise ConfigError(["--json and --output yaml: pass only one of them"])
    return "json" if as_json else output


def _model_fields(row: Any) -> dict[str, Any]:
    assert isinstance(row, BaseModel)
    return row.model_dump(mode="json")


@dataclass(frozen=True)
class Listing(Generic[T]):
    """Defines how to print a list of values of type T."""

    columns: tuple[Column[T], ...]
    empty: str
    """Text to print instead of an empty table."""
    record: Callable[[T], dict[str, Any]] = _model_fields
    """Function that converts a row to a JSON object."""
    footnote: Callable[[Sequence[T]], str] = lambda rows: ""
    """Text to print below the table; empty for none."""


def print_list(listing: Listing[T], fetch: Callable[[], Sequence[T]], output: OutputFormat, watch: bool) -> None:
    """Print the list. With `watch`, fetch and print it repeatedly until Ctrl-C.

    On a terminal, a watched table is updated in place; otherwise each changed list is printed.
    """
    if not watch:
        _print_rows(listing, fetch(), output)
        return
    with suppress(KeyboardInterrupt):
        if output == "table" and out.is_terminal:
            _update_in_place(listing, fetch)
        else:
            _print_changes(listing, fetch, output)


def print_service_list(
    listing: Listing[T], fetch: Callable[[Client], Sequence[T]], output: OutputFormat, watch: bool, as_json: bool
) -> None:
    """Print a list from the selected service; for a table, also print which service was selected."""
    chosen = chosen_format(output, as_json)
    with connected(chosen == "json", persistent=watch, announce=chosen == "table") as client:
        print_list(listing, lambda: fetch(client), chosen, watch)


def print_document(value: Any, output: OutputFormat) -> None:
    """Print a value as one line of JSON, or as YAML."""
    if output == "json":
        text = json.dumps(value)
    else:
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip()
    print(text, flush=True)


def _print_rows(listing: Listing[T], rows: Sequence[T], output: OutputFormat) -> None:
    if output == "table":
        out.print(_table(listing, rows))
        return
    print_document([listing.record(row) for row in rows], output)


def _table(listing: Listing[T], rows: Sequence[T]) -> RenderableType:
    if not rows:
        return Text(listing.empty)
    table = fitted_table(listing.columns, rows, out.width)
    footnote = listing.footnote(rows)
    return Group(table, Text(footnote, style="dim")) if footnote else table


def _update_in_place(listing: Listing[T], fetch: Callable[[], Sequence[T]]) -> None:
    with Live(console=out, auto_refresh=False) as live:
        while True:
            live.update(_table(listing, fetch()), refresh=True)
            time.sleep(WATCH_INTERVAL_S)


def _print_changes(listing: Listing[T], fetch: Callable[[], Sequence[T]], output: OutputFormat) -> None:
    printed: list[dict[str, Any]] | None = None
    while True:
        rows = fetch()
        records = [listing.record(row) for row in rows]
        if records != printed:
            if output == "yaml" and printed is not None:
                print("---")  # starts another document
            _print_rows(listing, rows, output)
            printed = records
        time.sleep(WATCH_INTERVAL_S)
