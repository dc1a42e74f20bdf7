"""`amd probe`: what a published encoder is worth, by nearest neighbours, a linear classifier and few labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from amd.config import ConfigError, ProbeConfig, overridden, parse_overrides, validate
from amd.presets.pretraining import read_config_file
from service.cli.submission import Submission, submittable

if TYPE_CHECKING:  # needs torch
    from amd.artifacts.weights import Score


@submittable
def probe(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="data.train=… (what is learnt on), data.test=…, knn.neighbours=…"),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", "-e", help="A published encoder: id, folder, URL.")
    ] = None,
    kinds: Annotated[str | None, typer.Option(help="knn, linear, few-shot, with commas; default: knn,linear.")] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="A probe as JSON or YAML: file or URL.")] = None,
    storage: Annotated[str | None, typer.Option(help="Root of encoders and features; default: AMD_STORAGE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON at the end, for programs.")] = False,
    job: Submission | None = None,
) -> None:
    """Probe a frozen encoder on labelled data; figures are added to its card."""
    overrides = parse_overrides(words or [])
    if "data" in overrides:
        raise ConfigError([f"data={overrides['data']}: a probe has two sets; give data.train=… and data.test=…"])
    options = {"encoder": encoder, "kinds": _kinds(kinds), "storage": storage}
    overrides |= {name: value for name, value in options.items() if value is not None}
    if job is not None:
        job.send("probe", None, config, overrides, as_json=as_json)
    chosen = validate(ProbeConfig, overridden(read_config_file(config) if config else {}, overrides))

    from amd.data.faults import DataFault
    from amd.downstream.probing.run import run_probe

    err = Console(stderr=True)
    try:
        report = run_probe(chosen, say=lambda line: err.print(line, style="dim", markup=False, soft_wrap=True))
    except DataFault as error:
        err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print(report.model_dump_json())
        return
    out = Console()
    out.print(_table(report.scores))
    if report.left_out:
        out.print(f"{len(report.left_out)} samples could not be read and were left out", highlight=False)
    out.print(f"added to the card of {report.encoder}", markup=False, highlight=False, soft_wrap=True)


def _kinds(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip().replace("-", "_") for word in text.split(",")]


def _table(scores: Sequence[Score]) -> Table:
    table = Table(caption="percent of the samples of data.test; ± standard deviation over the draws")
    table.add_column("probe")
    table.add_column("figure")
    table.add_column("percent", justify="right")
    for score in scores:
        for name, value in _with_spread(score.values):
            table.add_row(score.protocol.replace("_", "-"), name.removeprefix("eval/"), value)
    return table


def _with_spread(values: dict[str, float]) -> list[tuple[str, str]]:
    """Each figure as text, with its standard deviation where there is one."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if not name.endswith("_std"):
            spread = values.get(f"{name}_std")
            rows.append((name, f"{value:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")))
    return rows
