"""`amd detect`: train an action detector on a pre-trained encoder, score it by AVA's frame-mAP, and publish it."""

from __future__ import annotations

from typing import Annotated

import typer

from amd.config import parse_overrides
from amd.presets.detection import detection_config
from service.cli.options import AsJson, ConfigUrl, Local, PresetName
from service.cli.submission import Submission, submittable


@submittable
def detect(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="Overrides: weights=ENCODER, data.train=CSV, data.root=VIDEOS, data.val=CSV, …"
        ),
    ] = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    local: Local = False,
    as_json: AsJson = False,
    job: Submission | None = None,
) -> None:
    """Train an action detector on annotated key frames, score its best checkpoint by frame-mAP, and publish it."""
    values = parse_overrides(overrides or [])
    if job is not None:
        job.send("detect", preset, config, values, as_json=as_json)
    resolved = detection_config(preset, config, values)

    from amd.downstream.supervised.detection.run import detect as run

    result = run(resolved, local=local, quiet=as_json)
    if as_json:
        print(result.model_dump_json())
    raise typer.Exit(result.exit_code)
