"""The storage root and database that version 0.1 wrote (`tests/golden/store-0.1`), copied for a test to change.

Imports nothing of the project.
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
PLACEHOLDER = "/amd-store-0.1"  # stands for the absolute path of the storage root in text files and in the database
EXPECTED: dict[str, Any] = json.loads((STORE / "expected.json").read_text())


def copy_root(folder: Path) -> Path:
    """The storage root below `folder`, its absolute paths rewritten to the copy."""
    root = Path(shutil.copytree(STORE / "root", folder / "root"))
    for path in root.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts and path.suffix in (".json", ".jsonl", ".md", ".log"):
            path.write_text(path.read_text().replace(PLACEHOLDER, str(root)))
    return root


def copy_database(folder: Path, root: Path) -> Path:
    """A SQLite file below `folder` with the rows of version 0.1, at its schema."""
    path = folder / "control-plane.db"
    connection = sqlite3.connect(path)
    connection.executescript((STORE / "control-plane.sql").read_text().replace(PLACEHOLDER, str(root)))
    connection.close()
    return path


def shape(folder: Path) -> set[str]:
    """What files a folder holds and which keys its JSON files have, one line each; ids and numbers are masked."""
    lines = set[str]()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = re.sub(r"\d+", "N", str(path.relative_to(folder)))
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
    """`schedule.steps number`, for every value within; an empty list or mapping has no lines of its own."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _keys(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner, f"{prefix}[]")
    else:
        kinds = {"bool": "boolean", "int": "number", "float": "number", "str": "string", "NoneType": "null"}
        yield f"{prefix} {kinds[type(value).__name__]}"
