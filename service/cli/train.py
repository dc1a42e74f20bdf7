"""`amd train`, `amd finetune` and `amd detect`: train here, on a Ray cluster, or as a job on the service.

All training commands share the same options and differ only in what they train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from amd.commands import TRAINING_COMMANDS
from amd.config import parse_overrides
from service.cli.options import AsJson, ConfigUrl, Distributed, Local, PresetName, overrides_argument
from service.cli.submission import Submission, submittable

if TYPE_CHECKING:
    from service.jobs.kinds import JobKind


def training_command(name: JobKind) -> Callable[..., None]:
    """Return the Typer command for one kind of training, which runs here or is submitted as a job of that kind."""
    training = TRAINING_COMMANDS[name]

    def command(
        overrides: list[str] | None = None,
        preset: PresetName = None,
        config: ConfigUrl = None,
        local: Local = False,
        distributed: Distributed = False,
        as_json: AsJson = False,
        job: Submission | None = None,
    ) -> None:
        values = parse_overrides(overrides or [])
        if job is not None:
            job.send(name, preset, config, values, as_json=as_json)
        result = training.run(preset, config, values, local=local, distributed=distributed, quiet=as_json)
        if as_json:
            print(result.model_dump_json())
        raise typer.Exit(result.exit_code)

    command.__name__, command.__doc__ = name, training.summary
    command.__annotations__["overrides"] = overrides_argument(training.overrides)
    return submittable(command)


train = training_command("train")
finetune = training_command("finetune")
detect = training_command("detect")
