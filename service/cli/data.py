"""`amd prepare`, `amd validate` and `amd dataset`: convert and check data sets, and write bundled ones to disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from amd.config import ConfigError, TrainConfig, data_config, parse_overrides
from amd.presets.load import load_config
from amd.presets.teachers import teacher_recipe
from service.cli.console import out, print_plain
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
        typer.Option(
            metavar="K/N", help="Prepare every N-th shard, starting with the K-th, to share the work among N machines."
        ),
    ] = "1/1",
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.", show_default="the number of CPUs")] = max(
        1, os.cpu_count() or 1
    ),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Convert raw images or videos to indexed tar shards for fast training: small files with short GOPs. Resumable."""
    from amd.data.prepare import prepare as run_prepare

    data = data_config({"data.train": source, **parse_overrides(overrides or [], example="data.read_timeout_s=60")})
    report = run_prepare(data, output, short_side=short_side, gop=gop, segment_s=segment_s, part=part, workers=workers)
    if as_json:
        print(report.model_dump_json())
    else:
        out.print(str(report), highlight=False)


def validate(
    overrides: Overrides = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    decode_all: Annotated[
        bool,
        typer.Option(
            "--all", help="Decode every sample; default: up to 2,000 images of local data, 16 samples of other data."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a config and its data without training: `amd validate data=FOLDER`, or with --preset / --config."""
    from amd.data.validation import validate_data

    values = parse_overrides(overrides or [], example="data=FOLDER")
    if preset is None and config is None:
        data = data_config(values)
    else:
        run = load_config(TrainConfig, preset, config, values)
        if run.trains_teacher:
            teacher_recipe(run)  # raises for overrides that do not fit the teacher's preset
        data = run.data
    report = validate_data(data, decode_all=decode_all)
    if as_json:
        print(report.model_dump_json())
    else:
        print_plain(str(report))


def dataset(
    name: Annotated[str | None, typer.Argument(help="Data set to write; omit it to list all data sets.")] = None,
    output: Annotated[Path | None, typer.Argument(help="Output folder; must be empty or not exist yet.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Maximum number of samples per split; default: all of them.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for random splits and rendered clips.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a data set bundled with an installed package to folders and list files, or list all such data sets."""
    from amd.data.packaged.catalog import CATALOG
    from amd.data.packaged.source import WriteOptions, write

    if name is None:
        _list_datasets(as_json)
        return
    if name not in CATALOG:
        raise ConfigError([f"dataset {name} does not exist; choose one of {', '.join(CATALOG)}"])
    if output is None:
        raise ConfigError([f"dataset {name}: specify the folder to write to, as in `amd dataset {name} FOLDER`"])
    data = CATALOG[name]
    counts = write(name, data, output, WriteOptions(samples, seed))
    parts = {str(output / part): count for part, count in counts.items()}
    if as_json:
        print(json.dumps({"name": name, "licence": data.licence, "samples": parts}))
        return
    print_plain(f"{name}: {data.content}; licence: {data.licence}")
    print_plain(f"labels: {data.labels}")
    for part, count in parts.items():
        print_plain(f"  {part}  {count} samples")


def _list_datasets(as_json: bool) -> None:
    from amd.data.packaged.catalog import CATALOG

    rows = {name: {**data._asdict(), "installed": data.locate() is not None} for name, data in CATALOG.items()}
    if as_json:
        shown = ("package", "install", "licence", "content", "labels", "installed")
        print(json.dumps([{"name": name, **{key: row[key] for key in shown}} for name, row in rows.items()]))
        return
    table = Table("data set", "content", "licence", "install with")
    for name, row in rows.items():
        table.add_row(name, row["content"], row["licence"], "installed" if row["installed"] else row["install"])
    out.print(table)
