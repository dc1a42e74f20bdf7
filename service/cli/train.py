"""`amd train`: pre-train an encoder here, on a Ray cluster, or as a job of the service."""

from __future__ import annotations

import typer

from amd.config import parse_overrides
from amd.presets.pretraining import load_config
from service.cli.options import AsJson, ConfigUrl, Local, Overrides, PresetName
from service.cli.submission import Submission, submittable


@submittable
def train(
    overrides: Overrides = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    local: Local = False,
    as_json: AsJson = False,
    job: Submission | None = None,
) -> None:
    """Pre-train an encoder with Ray Train: on this machine, on the cluster at RAY_ADDRESS, or as a job."""
    values = parse_overrides(overrides or [])
    if job is not None:
        job.send("train", preset, config, values, as_json=as_json)
    resolved = load_config(preset, config, values)  # before torch is imported, so that invalid input fails fast

    from amd.training.runs.launch import train as launch

    result = launch(resolved, local=local, quiet=as_json)
    if as_json:
        print(result.model_dump_json())
    raise typer.Exit(result.exit_code)
