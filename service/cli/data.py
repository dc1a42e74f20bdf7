"""`amd prepare` and `amd validate`: convert a data set for training, and check a data set without training."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from amd.config import DataConfig, TrainConfig, data_fields, parse_overrides
from amd.config import validate as validate_config
from amd.presets.load import load_config
from service.cli.console import out
from service.cli.options import AsJson, ConfigUrl, Overrides, PresetName


def prepare(
    source: Annotated[str, typer.Argument(help="Raw images or videos: a folder, a list file or tar shards.")],
    output: Annotated[str, typer.Argument(help="Folder or URL to write the tar shards to.")],
    short_side: Annotated[
        int, typer.Option(min=16, help="Length of the shorter side in pixels; smaller files keep their size.")
    ] = 320,
    gop: Annotated[int, typer.Option(min=1, help="Key-frame interval of videos, in frames.")] = 12,
    segment_s: Annotated[
        float | None,
        typer.Option(min=0.1, help="Cut videos into samples of about this many seconds.", show_default="whole videos"),
    ] = None,
    part: Annotated[
        str,
        typer.Option(metavar="K/N", help="Prepare every N-th shard, from the K-th: N machines can share the work."),
    ] = "1/1",
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.", show_default="the number of CPUs")] = max(
        1, os.cpu_count() or 1
    ),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Convert raw files to indexed tar shards for fast training, scaled down and with short GOPs. Resumable."""
    from amd.data.prepare import prepare as run_prepare

    data = validate_config(DataConfig, {"train": source, **data_fields(parse_overrides(overrides or []))})
    report = run_prepare(data, output, short_side=short_side, gop=gop, segment_s=segment_s, part=part, workers=workers)
    if as_json:
        print(report.model_dump_json())
    else:
        out.print(str(report), highlight=False)


def validate(
    overrides: Overrides = None, preset: PresetName = None, config: ConfigUrl = None, as_json: AsJson = False
) -> None:
    """Check a config and its data without training: `amd validate data=FOLDER`, or with --preset / --config."""
    from amd.data.validation import validate_data

    values = parse_overrides(overrides or [])
    if preset is None and config is None:
        report = validate_data(validate_config(DataConfig, data_fields(values)))
    else:
        report = validate_data(load_config(TrainConfig, preset, config, values).data)
    if as_json:
        print(report.model_dump_json())
    else:
        out.print(str(report), highlight=False)
