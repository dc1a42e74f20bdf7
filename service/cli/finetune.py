"""`amd finetune`: train a classifier on a pre-trained encoder, test it with several views, and publish it."""

from __future__ import annotations

from typing import Annotated

import typer

from amd.config import parse_overrides
from amd.presets.finetuning import finetune_config
from service.cli.options import AsJson, ConfigUrl, Local, PresetName
from service.cli.submission import Submission, submittable


@submittable
def finetune(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="Overrides: weights=ENCODER, data.train=…, data.val=…, data.test=…"
        ),
    ] = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    local: Local = False,
    as_json: AsJson = False,
    job: Submission | None = None,
) -> None:
    """Fine-tune an encoder on labelled data, test its best checkpoint with all views, and publish it."""
    values = parse_overrides(overrides or [])
    if job is not None:
        job.send("finetune", preset, config, values, as_json=as_json)
    resolved = finetune_config(preset, config, values)

    from amd.downstream.supervised.classification.run import finetune as run

    result = run(resolved, local=local, quiet=as_json)
    if as_json:
        print(result.model_dump_json())
    raise typer.Exit(result.exit_code)
