"""Generate the reference pages in docs/reference/ from the code: config keys, presets, commands, settings and REST.

`make docs-reference` runs this program; `tests/test_docs.py` fails if a page is stale. Does not train or start
anything.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from generator.config_keys import config_page
from generator.rest import rest_page
from generator.tables import NOTE, code, paragraph, table, type_of

FOLDER = Path(__file__).parent / "reference"
WIDTH = 80  # of the help texts, in columns


def isolate_environment(home: str) -> None:
    """Keep details of this machine and its user out of the pages: environment, home folder and terminal."""
    warnings.simplefilter("ignore")
    logging.disable()
    for name in [name for name in os.environ if name.startswith(("AMD_", "RAY_", "XDG_", "TYPER_"))]:
        del os.environ[name]
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # with any of these, rich would print colours
        os.environ.pop(name, None)
    os.environ.update(HOME=home, COLUMNS=str(WIDTH), NO_COLOR="1", TERM="dumb", SHELL="/bin/bash")


def pages(folder: Path) -> dict[str, str]:
    """Return the text of each page, keyed by file name. `folder`: temporary folder for an empty database."""
    found = {
        "config.md": config_page(),
        "presets.md": presets_page(),
        "cli.md": cli_page(),
        "settings.md": settings_page(),
        "rest.md": rest_page(folder),
    }
    return {name: re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n" for name, text in found.items()}


# Presets


def presets_page() -> str:
    from amd.presets.detection import DETECTION_PRESETS
    from amd.presets.finetuning import FINETUNE_PRESETS
    from amd.presets.pretraining import PRESETS

    parts = [
        NOTE + "# Presets",
        "A preset is a complete config with a name. `amd presets` prints this list; `amd presets NAME` prints a "
        "config. GPU-hours are estimated from FLOPs for one H100 at 40% of peak bf16 throughput, not measured.",
    ]
    for command, presets in (("train", PRESETS), ("finetune", FINETUNE_PRESETS), ("detect", DETECTION_PRESETS)):
        rows = []
        for preset in presets.values():
            hours = getattr(preset, "gpu_hours", None)
            cost = f"{preset.hardware}; about {hours:.0f} GPU-hours" if hours else preset.hardware
            rows.append((f"`{preset.name}`", preset.summary, preset.source, cost))
        parts += [f"## amd {command}", table(("preset", "summary", "source of its values", "hardware"), rows)]
    return "\n\n".join(parts)


# Commands


def cli_page() -> str:
    import typer

    from service.cli.main import app

    parts = [
        NOTE + "# Commands",
        f"The output of `--help` for each command, {WIDTH} columns wide.",
    ]
    for path in command_paths(typer.main.get_command(app)):
        parts += [f"{'#' * min(2 + path.count(' '), 4)} {path}", f"```text\n{help_of(app, path)}\n```"]
    return "\n\n".join(parts)


def command_paths(command: Any, path: str = "amd") -> Iterator[str]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from command_paths(inner, f"{path} {name}")


def help_of(app: Any, path: str) -> str:
    program, *args = path.split(" ")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        app([*args, "--help"], prog_name=program, standalone_mode=False)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").splitlines()).strip()


# Settings


def settings_page() -> str:
    from service.settings import Settings

    schema = Settings.model_json_schema(mode="serialization")
    rows = []
    for name, field in Settings.model_fields.items():
        kind = type_of(schema["properties"][name], schema.get("$defs", {}))
        default = "computed" if field.default_factory else code(field.default)
        rows.append((f"`AMD_{name.upper()}`", kind, default, paragraph(field.description)))
    return "\n\n".join(
        [
            NOTE + "# Settings",
            "Environment variables of the control plane (`python -m service`). Everything that `amd up` needs has a "
            "default; `deploy/` sets the others.",
            table(("variable", "type", "default", "description"), rows),
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Write the pages to the given folder, by default docs/reference/."""
    target = Path(arguments[0]) if arguments else FOLDER
    with tempfile.TemporaryDirectory() as folder:
        isolate_environment(folder)
        os.cpu_count = lambda: 2  # the default of some options
        found = pages(Path(folder))
    target.mkdir(parents=True, exist_ok=True)
    for name, text in found.items():
        (target / name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
