"""Copy the storage root and database written by version 0.1 (`tests/golden/store-0.1`), so that tests can modify them.

Does not import the project.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STORE = Path(__file__).parents[1] / "golden" / "store-0.1"
PLACEHOLDER = "/amd-store-0.1"  # replaces the absolute path of the storage root in text files and in the database
EXPECTED: dict[str, Any] = json.loads((STORE / "expected.json").read_text())


def copy_root(folder: Path) -> Path:
    """Copy the storage root into `folder` and rewrite absolute paths to the copy."""
    root = Path(shutil.copytree(STORE / "root", folder / "root"))
    for path in root.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts and path.suffix in (".json", ".jsonl", ".md", ".log"):
            path.write_text(path.read_text().replace(PLACEHOLDER, str(root)))
    return root


def copy_database(folder: Path, root: Path) -> Path:
    """Create a SQLite file in `folder` with the schema and rows of version 0.1."""
    path = folder / "control-plane.db"
    connection = sqlite3.connect(path)
    connection.executescript((STORE / "control-plane.sql").read_text().replace(PLACEHOLDER, str(root)))
    connection.close()
    return path


def shape(folder: Path) -> set[str]:
    """Return one line per file in a folder and per key in its JSON files.

    Digests and numbers in file names are masked: digests of trained weights depend on the CPU.
    """
    lines = set[str]()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = re.sub(r"[0-9a-f]{32}", "DIGEST", str(path.relative_to(folder)))
            name = re.sub(r"\d+", "N", name)
            name = re.sub(r"(tfevents\.N).*", r"\1", name)
            lines.add(name)
            lines.update(f"{name}: {key}" for value in _values(path) for key in _keys(value))
    return lines


def _values(path: Path) -> Iterator[Any]:
    if path.suffix == ".json":
        yield json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        yield from map(json.loads, path.read_text().splitlines())


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield a line such as `schedule.steps number` for every nested value; empty lists and mappings yield nothing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _keys(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner, f"{prefix}[]")
    else:
        kinds = {"bool": "boolean", "int": "number", "float": "number", "str": "string", "NoneType": "null"}
        yield f"{prefix} {kinds[type(value).__name__]}"
