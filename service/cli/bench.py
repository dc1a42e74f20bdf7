"""`amd bench`: measure a training step, or the data path, on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from amd.config import DataConfig, TrainConfig, flatten, parse_overrides, validate
from amd.presets.load import load_config
from amd.presets.preset import UNSET
from service.cli.console import out, print_progress
from service.cli.data import data_fields
from service.cli.options import AsJson, ConfigUrl, Overrides, PresetName

app = typer.Typer(help="Measure a training step, or the data path, on this machine.", no_args_is_help=True)


@app.command("step")
def step(
    overrides: Overrides = None,
    preset: PresetName = "k400-vit-b",
    config: ConfigUrl = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips per step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Number of measured steps.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure samples/s of a training step, the time share of each part, and the fraction of peak matmul throughput."""
    from amd.bench.step import bench_step

    name = None if config else preset
    values = {"scaling.device": "auto", **parse_overrides(overrides or [])}
    figures = bench_step(load_config(TrainConfig, name, config, values, complete=False), batch=batch, steps=steps)
    figures = {"preset": name, **figures} if name else figures
    if as_json:
        print(json.dumps(figures))
    else:
        out.print(_figure_table(figures, "One training step"))


@app.command("data")
def data(
    overrides: Overrides = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples to read.")] = 40,
    target: Annotated[
        float | None,
        typer.Option(help="Clips/s that a training worker consumes; adds a recommended number of readers."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure clips/s per core of the data path and its parts, compared with plain decord on the same files.

    Without a preset, a config or data.train=…, 340x256 H.264 clips are generated first.
    """
    from amd.bench.data import bench_data, bench_table

    values = parse_overrides(overrides or [])
    if preset is None and config is None:
        chosen = validate(DataConfig, data_fields(values)) if values else None
        figures = bench_data(chosen, samples=samples, target=target, log=print_progress)
    else:
        resolved = load_config(TrainConfig, preset, config, values, complete=False)
        chosen = None if resolved.data.train.startswith(UNSET) else resolved.data
        figures = bench_data(chosen, resolved.clip, samples=samples, target=target)
    if as_json:
        print(json.dumps(figures))
    else:
        out.print(bench_table(figures))


def _figure_table(figures: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, show_header=False)
    for key, value in flatten(figures).items():
        if value is None:  # not measured
            continue
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table
