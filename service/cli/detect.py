"""`amd detect`: what people in videos do, on a pre-trained encoder; scored by frame-mAP as AVA does, and published."""

from __future__ import annotations

from typing import Annotated

import typer

from amd.config import parse_overrides
from amd.presets.detection import detection_config
from service.cli.submission import Submission, submittable


@submittable
def detect(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="weights=ENCODER, data.train=CSV, data.root=VIDEOS, data.val=CSV, …"
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", "-p", help="A named recipe: ava-vit-s, ava-vit-b.")] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="A config as JSON or YAML: file or URL.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Train in this process, without Ray.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON at the end, for programs.")] = False,
    job: Submission | None = None,
) -> None:
    """Train an action detector on annotated key frames, score its best checkpoint by frame-mAP, and publish it."""
    overrides = parse_overrides(words or [])
    if job is not None:
        job.send("detect", preset, config, overrides, as_json=as_json)
    chosen = detection_config(preset, config, overrides)

    from amd.downstream.supervised.detection.run import detect as run

    result = run(chosen, local=local, quiet=as_json)
    if as_json:
        print(result.model_dump_json())
    raise typer.Exit(result.exit_code)
