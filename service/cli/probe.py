"""`amd probe`: score a published encoder with nearest-neighbour, linear, few-shot and attentive probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from amd.config import ConfigError, ProbeConfig, parse_overrides, with_overrides
from amd.presets.load import load_file
from service.cli.console import fail, out, print_plain, print_progress
from service.cli.encoder_source import stored_encoder
from service.cli.options import AsJson, ConfigUrl, EncoderName, ProbeOverrides, Storage
from service.cli.submission import Submission, submittable
from service.web.formats import plural

if TYPE_CHECKING:  # requires torch
    from amd.artifacts.weights import Score


@submittable
def probe(
    overrides: ProbeOverrides = None,
    encoder: EncoderName = None,
    kinds: Annotated[
        str | None, typer.Option(help="Probes, comma-separated: knn, linear, few-shot, attentive; default: knn,linear.")
    ] = None,
    config: ConfigUrl = None,
    storage: Storage = None,
    as_json: AsJson = False,
    job: Submission | None = None,
) -> None:
    """Probe a frozen encoder on labelled data, and add the scores to its card."""
    values = parse_overrides(overrides or [])
    if "data" in values:
        raise ConfigError([f"data={values['data']}: a probe needs two data sets; set data.train=… and data.test=…"])
    options = {"encoder": encoder, "kinds": _kinds(kinds), "storage": storage}
    values |= {name: value for name, value in options.items() if value is not None}
    if job is not None:
        job.send("probe", None, config, values, as_json=as_json)
    resolved = load_file(ProbeConfig, config, values)
    resolved = with_overrides(resolved, {"encoder": stored_encoder(resolved.encoder, resolved.storage)})

    from amd.data.faults import DataFault
    from amd.downstream.probing.run import run_probe

    try:
        report = run_probe(resolved, log=print_progress)
    except DataFault as error:
        fail(str(error))
    if as_json:
        print(report.model_dump_json())
        return
    out.print(_score_table(report.scores))
    if report.left_out:
        out.print(f"could not be read and were skipped: {plural(len(report.left_out), 'sample')}", highlight=False)
    print_plain(f"added to the card of {report.encoder}")


def _kinds(text: str | None) -> list[str] | None:
    return None if text is None else [kind.strip().replace("-", "_") for kind in text.split(",")]


def _score_table(scores: Sequence[Score]) -> Table:
    table = Table(caption="Percentage of the samples in data.test; ± standard deviation over the draws")
    table.add_column("probe")
    table.add_column("metric")
    table.add_column("percent", justify="right")
    for score in scores:
        for name, value in _with_deviation(score.values):
            table.add_row(score.protocol.replace("_", "-"), name.removeprefix("eval/"), value)
    return table


def _with_deviation(values: dict[str, float]) -> list[tuple[str, str]]:
    """Format each metric, with its standard deviation if there is one."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if not name.endswith("_std"):
            deviation = values.get(f"{name}_std")
            rows.append((name, f"{value:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")))
    return rows
