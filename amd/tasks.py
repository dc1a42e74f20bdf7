"""`python -m amd.tasks COMMAND --config FILE_OR_URL key=value…`: what trains nothing, as a job runs it.

    import      foreign weights become a published encoder
    export      a published encoder in another format
    prepare     a raw collection as tar shards that are fast to read

Ends with one JSON line on standard output. Exit code 0: done; 1: failed or stopped; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from amd.artifacts.discovery import encoder_url
from amd.config import ConfigError, ExportConfig, ImportConfig, PrepareConfig, TaskConfig, overridden, parse_overrides
from amd.config import validate as validated
from amd.entry_point import ended
from amd.presets.pretraining import read_config_file
from amd.storage import join, resolve_root

C = TypeVar("C", bound=TaskConfig)


def import_weights(config: ImportConfig) -> dict[str, Any]:
    from amd.exchange.importing import import_encoder  # torch: only once the config is known to be good

    done = import_encoder(config)
    return {"encoder_folder": done.url, "weights_license": done.card.weights_license, "notes": done.notes}


def export_encoder(config: ExportConfig) -> dict[str, Any]:
    from amd.exchange.export import export
    from amd.exchange.formats import EXPORTERS

    url = encoder_url(resolve_root(config.storage), config.encoder)
    name = url.rstrip("/").rpartition("/")[2] + "".join(EXPORTERS[config.format].suffixes[:1])
    return export(url, config.format, join(_output(config), name)).model_dump(mode="json")


def prepare_data(config: PrepareConfig) -> dict[str, Any]:
    from amd.data.prepare import prepare

    options = config.model_dump(exclude={"storage", "data", "output"})
    return prepare(config.data, _output(config), progress=_tell, **options).model_dump(mode="json")


def _output(config: ExportConfig | PrepareConfig) -> str:
    if config.output is None:
        raise ConfigError(["output: required; a folder or URL that is written into"])
    return config.output


def _tell(done: int, total: int) -> None:
    print(f"{done} of {total} samples", file=sys.stderr, flush=True)


class Task(NamedTuple):
    config: type[TaskConfig]
    do: Callable[[Any], dict[str, Any]]


TASKS: dict[str, Task] = {
    "import": Task(ImportConfig, import_weights),
    "export": Task(ExportConfig, export_encoder),
    "prepare": Task(PrepareConfig, prepare_data),
}


def main(words: Sequence[str] | None = None) -> int:
    name, *rest = list(sys.argv[1:] if words is None else words) or [""]
    if name not in TASKS:
        print(f"error: {name!r} is no command; one of {', '.join(TASKS)}\n\n{__doc__}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(prog=f"python -m amd.tasks {name}")
    parser.add_argument("--config", help="a file or URL, JSON or YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(rest)
    return ended(lambda: _run(TASKS[name], options.config, options.overrides), "goes on from what was finished")


def _run(task: Task, file: str | None, overrides: Sequence[str]) -> int:
    values = read_config_file(file) if file else {}
    config = validated(task.config, overridden(values, parse_overrides(overrides)))
    print(json.dumps(task.do(config)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
