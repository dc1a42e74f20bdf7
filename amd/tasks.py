"""Entry point for import, export and prepare jobs: `python -m amd.tasks COMMAND --config FILE_OR_URL key=value…`.

    import      publish third-party weights as an encoder
    export      convert a published encoder to another format
    prepare     convert a data set to tar shards that are fast to read

The last line of standard output is the result as JSON. Exit codes: 0 success, 1 failed or interrupted, 2 invalid input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from amd.artifacts.discovery import encoder_url
from amd.commands import CONFIG
from amd.config import ConfigError, ExportConfig, ImportConfig, PrepareConfig, TaskConfig, parse_overrides
from amd.entry_point import argument_parser, print_progress, run_named_command
from amd.presets.load import load_file
from amd.storage import join, resolve_root

C = TypeVar("C", bound=TaskConfig)


def import_weights(config: ImportConfig) -> dict[str, Any]:
    from amd.exchange.importing import import_encoder  # imports torch, so import it after validation

    imported = import_encoder(config)
    return {
        "encoder_folder": imported.url,
        "weights_license": imported.card.weights_license,
        "notes": imported.notes,
    }


def export_encoder(config: ExportConfig) -> dict[str, Any]:
    from amd.exchange.export import export
    from amd.exchange.formats import EXPORTERS

    url = encoder_url(resolve_root(config.storage), config.encoder)
    name = url.rstrip("/").rpartition("/")[2] + "".join(EXPORTERS[config.format].suffixes[:1])
    return export(url, config.format, join(_output(config), name)).model_dump(mode="json")


def prepare_data(config: PrepareConfig) -> dict[str, Any]:
    from amd.data.prepare import prepare

    options = config.model_dump(exclude={"storage", "data", "output"})
    return prepare(config.data, _output(config), progress=_print_progress, **options).model_dump(mode="json")


def _output(config: ExportConfig | PrepareConfig) -> str:
    if config.output is None:
        raise ConfigError(["output: required; set it to a folder or URL"])
    return config.output


def _print_progress(done: int, total: int) -> None:
    print_progress(f"{done} of {total} samples")


class Task(NamedTuple):
    """A command: its config class, and the function that runs it and returns the result."""

    config: type[TaskConfig]
    run: Callable[[Any], dict[str, Any]]


TASKS: dict[str, Task] = {
    "import": Task(ImportConfig, import_weights),
    "export": Task(ExportConfig, export_encoder),
    "prepare": Task(PrepareConfig, prepare_data),
}


def main(args: Sequence[str] | None = None) -> int:
    commands = {name: partial(_run, name) for name in TASKS}
    return run_named_command(commands, args, __doc__, "keeps the parts that are finished")


def _run(name: str, args: Sequence[str]) -> int:
    options = argument_parser(f"amd.tasks {name}", CONFIG, overrides="Config overrides.").parse_args(args)
    config = load_file(TASKS[name].config, options.config, parse_overrides(options.overrides))
    print(json.dumps(TASKS[name].run(config)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
