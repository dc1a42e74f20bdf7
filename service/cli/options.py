"""Arguments and options shared by several commands, with the same wording in every `--help`.

Options that job programs also accept are defined in `amd.commands`.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from amd import commands
from amd.commands import CommandOption


def overrides_argument(text: str) -> Any:
    """Return the annotation for a command's overrides argument, with the given help text."""
    return Annotated[list[str] | None, _overrides(text)]


def _overrides(text: str) -> Any:
    return typer.Argument(metavar="[KEY=VALUE]…", help=text)


def _option(option: CommandOption) -> Any:
    return typer.Option(*option.flags, help=option.help)


Overrides = Annotated[list[str] | None, _overrides(commands.OVERRIDES)]
ProbeOverrides = Annotated[list[str] | None, _overrides(commands.PROBE_OVERRIDES)]
SweepOverrides = Annotated[list[str] | None, _overrides(commands.SWEEP_OVERRIDES)]
PresetName = Annotated[str | None, _option(commands.PRESET)]
ConfigUrl = Annotated[str | None, _option(commands.CONFIG)]
AsJson = Annotated[bool, _option(commands.AS_JSON)]
Local = Annotated[bool, _option(commands.LOCAL)]
Distributed = Annotated[bool, _option(commands.DISTRIBUTED)]
LocalEmbed = Annotated[bool, _option(commands.LOCAL_EMBED)]
Storage = Annotated[str | None, _option(commands.STORAGE)]
EncoderName = Annotated[
    str | None, typer.Option("--encoder", "-e", help="Published encoder: ID, ID prefix, folder or URL.")
]
Follow = Annotated[
    bool | None,
    typer.Option("--follow/--no-follow", help="Print the job's log until the job ends; default: only on a terminal."),
]
