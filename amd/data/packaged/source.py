"""Data sets inside installed packages: their location, their licence, and the function that writes their files.

The writers for the individual data sets are in the other modules of this package.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from amd.config import ConfigError

SPLITS = ("train", "select", "test")
"""Splits of every labelled data set. `select` is for choosing settings, so that `test` is used once."""


class WriteOptions(NamedTuple):
    samples: int | None
    """Maximum number of samples per split. None: all samples, or the default number for rendered data sets."""
    seed: int


class PackagedData(NamedTuple):
    """A data set that an installed package contains or renders."""

    package: str
    """Name of the package that must be installed."""
    install: str
    """Command that installs the package."""
    licence: str
    content: str
    labels: str
    locate: Callable[[], Path | None]
    """Function that returns the folder with the package's files, or None if the package is not installed."""
    write: Callable[[Path, Path, WriteOptions], dict[str, int]]
    """Function that writes the data set from a source folder to an empty folder, and returns sample counts by list
    file or folder."""


def python_package(name: str) -> Callable[[], Path | None]:
    """Return a function that locates an installed Python package without importing it."""

    def locate() -> Path | None:
        spec = find_spec(name)
        return Path(spec.origin).parent if spec is not None and spec.origin is not None else None

    return locate


def locate(name: str, data: PackagedData) -> Path:
    """Return the folder that contains the package's files. Raises ConfigError with the install command."""
    found = data.locate()
    if found is None:
        raise ConfigError([f"dataset {name}: the package {data.package} is not installed; run `{data.install}`"])
    return found


def write(name: str, data: PackagedData, output: Path, options: WriteOptions) -> dict[str, int]:
    """Write a data set to the folder `output`, atomically, with its origin and licence in README.txt.

    Raises ConfigError if the package is not installed, or if `output` is not an empty folder.
    """
    source, output = locate(name, data), output.expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError([f"output={output} exists and is not empty; specify another folder, or remove this one"])
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part-{uuid.uuid4().hex[:8]}")
    try:
        part.mkdir()
        counts = data.write(source, part, options)
        (part / "README.txt").write_text(_readme(name, data, counts))
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


def _readme(name: str, data: PackagedData, counts: dict[str, int]) -> str:
    lines = [
        f"{name}: {data.content}",
        f"Source: the package {data.package}",
        f"Licence: {data.licence}",
        f"Labels: {data.labels}",
        *(f"{key}: {count} samples" for key, count in counts.items()),
    ]
    return "\n".join(lines) + "\n"
