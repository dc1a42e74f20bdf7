"""Arguments and options shared by several commands, with the same wording in every `--help`."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Config overrides, e.g. mask.teacher_ratio=0.6."),
]
PresetName = Annotated[
    str | None, typer.Option("--preset", "-p", help="Named recipe; `amd presets` lists all of them.")
]
ConfigUrl = Annotated[str | None, typer.Option("--config", "-c", help="File or URL of a JSON or YAML config.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
Local = Annotated[bool, typer.Option("--local", help="Train in this process, without Ray.")]
Storage = Annotated[str | None, typer.Option(help="Storage root of runs and encoders; default: AMD_STORAGE.")]
EncoderName = Annotated[str | None, typer.Option("--encoder", "-e", help="Published encoder: id, folder or URL.")]
