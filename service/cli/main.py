"""The `amd` command: each subcommand parses, calls one function of a room, and prints for people, or JSON with --json.

Exit codes: 0 done, 1 failed, 2 bad input. Rooms are imported where they are used, so `amd presets` needs no torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from amd.config import ConfigError, DataConfig, parse_overrides, validate
from amd.presets.detection import DETECTION_PRESETS
from amd.presets.finetuning import FINETUNE_PRESETS
from amd.presets.pretraining import PRESETS, UNSET, load_config
from amd.presets.pretraining import preset as find_preset
from amd.storage import StorageError
from service.cli.detect import detect
from service.cli.embed import embed
from service.cli.encoders import app as encoders_app
from service.cli.finetune import finetune
from service.cli.jobs import app as jobs_app
from service.cli.probe import probe
from service.cli.search import app as search_app
from service.cli.stack import down, status, up
from service.cli.submission import Submission, submittable

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry unless the user turns it on

DONE, FAILED, BAD_INPUT = 0, 1, 2

app = typer.Typer(
    name="amd",
    help="Small vision encoders by Asymmetric Masked Distillation: pre-train, measure, embed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Measure a training step, or the reading of data, on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(encoders_app, name="encoders")
app.add_typer(search_app, name="search")
app.add_typer(jobs_app, name="jobs")
for _command in (finetune, detect, probe, embed, up, down, status):
    app.command()(_command)
out = Console()
err = Console(stderr=True)

Words = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, e.g. mask.teacher_ratio=0.6")
]
PresetName = Annotated[str | None, typer.Option("--preset", "-p", help="A named recipe; `amd presets` lists them.")]
ConfigUrl = Annotated[str | None, typer.Option("--config", "-c", help="A config as JSON or YAML: file or URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON at the end, for programs.")]
Local = Annotated[bool, typer.Option("--local", help="Train in this process, without Ray.")]


@app.command()
@submittable
def train(
    words: Words = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    local: Local = False,
    as_json: AsJson = False,
    job: Submission | None = None,
) -> None:
    """Pre-train an encoder: on Ray Train workers here, on the cluster that RAY_ADDRESS names, or as a job."""
    overrides = parse_overrides(words or [])
    if job is not None:
        job.send("train", preset, config, overrides, as_json=as_json)
    chosen = load_config(preset, config, overrides)  # before torch is imported: mistakes show at once

    from amd.training.runs.launch import train as launch

    result = launch(chosen, local=local, quiet=as_json)
    if as_json:
        print(result.model_dump_json())
    raise typer.Exit(result.exit_code)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Show this one whole.")] = None, as_json: AsJson = False
) -> None:
    """List the named recipes with their source, hardware and cost; or show one as a config."""
    others: dict[str, dict[str, Any]] = {"finetune": {**FINETUNE_PRESETS}, "detect": {**DETECTION_PRESETS}}
    if name is not None:
        found = next((them[name] for them in others.values() if name in them), None)
        print((found or find_preset(name)).config.model_dump_json(indent=2))
        return
    rows: list[tuple[str, Any, float | None]] = [("train", p, p.gpu_hours) for p in PRESETS.values()]
    rows += [(kind, p, None) for kind, them in others.items() for p in them.values()]
    if as_json:
        facts = ("name", "summary", "source", "hardware")
        listed = (
            {"kind": kind, **{fact: getattr(p, fact) for fact in facts}, "gpu_hours_estimate": hours}
            for kind, p, hours in rows
        )
        print(json.dumps(list(listed)))
        return
    table = Table(caption="GPU-hours: estimated from FLOPs for an H100 at 40 % of its bf16 rate.", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("amd …")
    table.add_column("what, and where its values come from")
    table.add_column("hardware and cost")
    for kind, p, hours in rows:
        cost = f"{p.hardware}\nabout {hours:.0f} GPU-hours" if hours else p.hardware
        table.add_row(p.name, kind, f"{p.summary}\n[dim]{p.source}[/dim]", cost)
    out.print(table)


@app.command("validate")
def validate_command(
    words: Words = None, preset: PresetName = None, config: ConfigUrl = None, as_json: AsJson = False
) -> None:
    """Check a config and its data without training: `amd validate data=FOLDER`, or with --preset / --config."""
    from amd.data.validation import validate_data

    overrides = parse_overrides(words or [])
    if preset is None and config is None:
        report = validate_data(validate(DataConfig, _data_section(overrides)))
    else:
        report = validate_data(load_config(preset, config, overrides).data)
    if as_json:
        print(report.model_dump_json())
    else:
        out.print(str(report), highlight=False)


@app.command()
def demo(
    storage: Annotated[str | None, typer.Option(help="Where runs and encoders go; default: AMD_STORAGE.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat everything over so many seeds.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Add the baselines that tell the whole truth.")] = False,
    finetune: Annotated[bool, typer.Option("--finetune", help="Fine-tune the students on 10 labels a class.")] = False,
    image: Annotated[bool, typer.Option(help="Digits as images.")] = True,
    video: Annotated[bool, typer.Option(help="Moving digits as H.264 clips.")] = True,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """A teacher, an AMD student and the same student undistilled, on real digits, in minutes on two CPU cores.

    Its runs are jobs of a service that it starts on this machine, which then serves the student it has made.
    """
    from amd.storage import resolve_root

    console = err if as_json else out
    root = resolve_root(storage)
    with _demo_service(root, console, local) as service:
        from amd.demo.run import DemoFailed, run_demo  # torch comes in while the service starts

        try:
            report = run_demo(
                root,
                runner=service.run if service is not None else None,
                seeds=seeds,
                full=full,
                finetuned=finetune,
                image=image,
                video=video,
                console=console,
            )
        except DemoFailed as error:
            _stop([str(error)], FAILED)
        if service is not None:
            served = service.serve(str(report.embedded["encoder"]), str(report.embedded["file"]))
            report = report.model_copy(update={"served": served})
    if as_json:
        print(report.model_dump_json())


@contextmanager
def _demo_service(root: str, console: Console, local: bool) -> Iterator[Any]:
    """None: runs in this process."""
    if local:
        yield None
        return
    from service.cli.demo_jobs import demo_service
    from service.client import ApiError, NoAnswer
    from service.stack import StackError

    try:
        with demo_service(root, console) as service:
            yield service
    except (StackError, ApiError, NoAnswer) as error:
        _stop([str(error)], FAILED)


@app.command()
def parity(
    folder: Annotated[str, typer.Argument(help="A folder of golden numbers of the official code.")],
    as_json: AsJson = False,
) -> None:
    """Replay numbers of the official code with these modules; exit 1 where one is beyond its tolerance."""
    from amd.parity import run

    report = run(folder)
    if as_json:
        print(report.as_json())
    else:
        for line in report.lines():
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(DONE if report.ok else FAILED)


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="Raw images or videos: folder, list file or tar shards.")],
    output: Annotated[str, typer.Argument(help="A folder or URL for the tar shards.")],
    short_side: Annotated[int, typer.Option(min=16, help="Shorter side in pixels; smaller ones stay.")] = 320,
    gop: Annotated[int, typer.Option(min=1, help="Frames between key frames of a video.")] = 12,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = max(1, os.cpu_count() or 1),
    words: Words = None,
    as_json: AsJson = False,
) -> None:
    """Turn a raw collection into what trains fast: scaled down, small GOP, tar shards with an index. Resumable."""
    from amd.data.prepare import prepare as run_prepare

    data = validate(DataConfig, {"train": source, **_data_section(parse_overrides(words or []))})
    report = run_prepare(data, output, short_side=short_side, gop=gop, workers=workers)
    if as_json:
        print(report.model_dump_json())
    else:
        out.print(str(report), highlight=False)


@bench_app.command("step")
def bench_step_command(
    words: Words = None,
    preset: PresetName = "k400-vit-b",
    config: ConfigUrl = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips at once.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps measured.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Samples/s of a training step, where its time goes, and its share of the machine's matrix-multiply rate."""
    from amd.bench.step import bench_step

    name = None if config else preset
    chosen = load_config(name, config, {"scaling.device": "auto", **parse_overrides(words or [])}, complete=False)
    figures = bench_step(chosen, batch=batch, steps=steps)
    _figures({"preset": name, **figures} if name else figures, as_json, "One training step")


@bench_app.command("data")
def bench_data_command(
    words: Words = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples read.")] = 40,
    target: Annotated[float | None, typer.Option(help="Clips/s a training worker takes: recommends readers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Clips/s per core of the data path and its parts, against bare decord on the same files.

    Without a preset, a config or data.train=… it writes 340x256 H.264 clips first.
    """
    from amd.bench.data import bench_data, bench_table

    overrides = parse_overrides(words or [])
    if preset is None and config is None:
        data = validate(DataConfig, _data_section(overrides)) if overrides else None
        figures = bench_data(data, samples=samples, target=target, say=lambda line: err.print(line, style="dim"))
    else:
        chosen = load_config(preset, config, overrides, complete=False)
        data = None if chosen.data.train.startswith(UNSET) else chosen.data
        figures = bench_data(data, chosen.clip, samples=samples, target=target)
    if as_json:
        print(json.dumps(figures))
    else:
        out.print(bench_table(figures))


def _data_section(overrides: dict[str, Any]) -> dict[str, Any]:
    """`data=…` or `data.train=… data.crop=…` as the fields of a DataConfig."""
    overrides = {"data.train" if key == "data" else key: value for key, value in overrides.items()}
    strangers = [key for key in overrides if not key.startswith("data.")]
    if strangers:
        raise ConfigError([f"{key}: without --preset or --config only data.… is read here" for key in strangers])
    return {key.removeprefix("data."): value for key, value in overrides.items()}


def _figures(figures: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(title=title, show_header=False)
    for key, value in _flat(figures):
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    out.print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


@app.callback(invoke_without_command=True)
def _version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(version("amd-service"))
        raise typer.Exit(DONE)


def _stop(problems: list[str], code: int) -> NoReturn:
    for problem in problems:
        err.print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def main() -> None:
    """Run the command. A user's mistake ends in its message and exit code 2, not in a traceback."""
    try:
        app()
    except ConfigError as error:
        _tell(error.problems)
    except StorageError as error:
        _tell([str(error)])


def _tell(problems: list[str]) -> NoReturn:
    for problem in problems:
        err.print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
    if "--json" in sys.argv:
        print(json.dumps({"state": "invalid", "problems": problems}))
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
