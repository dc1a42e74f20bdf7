"""`amd bench`: measure a training step, or the data path, on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from amd.bench.commands import BATCH, HELP, SAMPLES, STEP_PRESET, STEPS, data_figures, step_figures
from amd.bench.tables import TextTable, data_table, step_table
from service.cli.console import out, print_progress
from service.cli.options import AsJson, ConfigUrl, Overrides, PresetName

app = typer.Typer(help="Measure a training step, or the data path, on this machine.", no_args_is_help=True)


@app.command("step")
def step(
    overrides: Overrides = None,
    preset: PresetName = STEP_PRESET,
    config: ConfigUrl = None,
    batch: Annotated[int, typer.Option(min=1, help=HELP["batch"])] = BATCH,
    steps: Annotated[int, typer.Option(min=1, help=HELP["steps"])] = STEPS,
    as_json: AsJson = False,
) -> None:
    """Measure a training step: samples/s, each part's share of the time, and the fraction of peak matmul throughput."""
    figures = step_figures(overrides or [], preset, config, batch=batch, steps=steps)
    _print(figures, step_table(figures), as_json)


@app.command("data")
def data(
    overrides: Overrides = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    samples: Annotated[int, typer.Option(min=1, help=HELP["samples"])] = SAMPLES,
    target: Annotated[float | None, typer.Option(help=HELP["target"])] = None,
    as_json: AsJson = False,
) -> None:
    """Measure clips/s per core for the data path and its parts, compared with plain decord on the same files.

    Without a preset, a config or data.train=…, 340x256 H.264 clips are generated first.
    """
    figures = data_figures(overrides or [], preset, config, samples=samples, target=target, log=print_progress)
    _print(figures, data_table(figures), as_json)


def _print(figures: dict[str, Any], table: TextTable, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
    else:
        out.print(_rendered(table))


def _rendered(table: TextTable) -> Table:
    rendered = Table(title=table.title, show_header=bool(table.header))
    for number in range(len(table.rows[0])):
        heading = table.header[number] if table.header else ""
        rendered.add_column(heading, justify="right" if table.header and number else "left")
    for row in table.rows:
        rendered.add_row(*row)
    return rendered
