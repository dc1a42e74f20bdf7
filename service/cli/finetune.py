"""`amd finetune`: a classifier on a pre-trained encoder, tested with several views and published."""

from __future__ import annotations

from typing import Annotated

import typer

from amd.config import parse_overrides
from amd.presets.finetuning import finetune_config
from service.cli.submission import Submission, submittable


@submittable
def finetune(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="weights=ENCODER, data.train=…, data.val=…, data.test=…"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="A named recipe; `amd presets` lists them.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="A config as JSON or YAML: file or URL.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Train in this process, without Ray.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON at the end, for programs.")] = False,
    job: Submission | None = None,
) -> None:
    """Fine-tune an encoder on labelled data, test its best checkpoint with all views, and publish it."""
    overrides = parse_overrides(words or [])
    if job is not None:
        job.send("finetune", preset, config, overrides, as_json=as_json)
    chosen = finetune_config(preset, config, overrides)

    from amd.downstream.supervised.classification.run import finetune as run

    result = run(chosen, local=local, quiet=as_json)
    if as_json:
        print(result.model_dump_json())
    raise typer.Exit(result.exit_code)
