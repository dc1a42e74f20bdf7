"""Collect the public surface, which is recorded as text files in `tests/golden/surface`.

Run `python -m tests.support.surface` from the root of the repository. It prints JSON; with
`--write` it updates the files instead.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "surface"
FAILED = "cannot be collected:"
WRITE = "python -m tests.support.surface --write"


def collect(folder: Path) -> dict[str, list[str]]:
    """Return sorted lines by file name. `folder` is a temporary folder for a database and a copy of the store."""
    _isolate_environment(folder)
    from service.db.engine import open_engine
    from tests.support import surface_programs as programs
    from tests.support import surface_service as service

    client = service.served(folder)
    parts: dict[str, Iterable[str]] = {
        "rest.txt": service.api_lines(client),
        "jobs.txt": service.job_lines(client),
        "metrics.txt": service.metric_lines(client),
        "events.txt": service.event_lines(client),
        "errors.txt": service.error_lines(client),
        "configs.txt": service.config_lines(client),
        "presets.txt": service.preset_lines(client),
        "environment.txt": service.environment_lines(REPOSITORY),
        "database.txt": service.database_lines(open_engine(f"sqlite:///{folder / 'empty.db'}")),
        "command.txt": programs.command_lines(),
        "programs.txt": programs.program_lines(),
        "exit_codes.txt": programs.exit_code_lines(str(folder / "root"), service.JOBS["succeeded"]),
        "python.txt": programs.python_lines(),
    }
    return {name: _collected(lines) for name, lines in parts.items()}


def _collected(lines: Iterable[str]) -> list[str]:
    """Return the unique lines, sorted, or the traceback if collecting them fails."""
    try:
        return sorted(set(lines))
    except Exception:
        return [FAILED, *traceback.format_exc().splitlines()]


def _isolate_environment(folder: Path) -> None:
    """Make defaults independent of this machine and its user: environment, home folder and CPU count."""
    warnings.simplefilter("ignore")
    logging.disable()
    for name in [name for name in os.environ if name.startswith(("AMD_", "RAY_", "XDG_"))]:
        del os.environ[name]
    os.environ.update(HOME=str(folder), AMD_DATA_DIR=str(folder / "data"), COLUMNS="100", NO_COLOR="1")
    os.cpu_count = lambda: 2


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = collect(Path(folder))
    if "--write" in sys.argv:
        broken = [line for lines in found.values() if lines[:1] == [FAILED] for line in lines]
        if broken:
            sys.exit("\n".join(broken))
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for stale in GOLDEN.glob("*.txt"):
            stale.unlink()
        for name, lines in found.items():
            (GOLDEN / name).write_text("\n".join(lines) + "\n")
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
