"""Access to the files in a golden folder, recording which tensors were read so that unread ones can be reported.

Does not interpret the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from amd.parity.report import ParityReport


class GoldenTensors:
    """The tensors of one safetensors file. `take` returns a tensor and marks it as checked."""

    def __init__(self, folder: Path, name: str, report: ParityReport) -> None:
        self.name = name
        self._report = report
        self._tensors: dict[str, Tensor] = {}
        self._left: set[str] = set()
        self.readable = False
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            report.fail(name, "file", f"{path.name} is missing")
            return
        try:
            self._tensors = load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            report.fail(name, "file", f"{path.name} cannot be read: {error}")
            return
        self.readable = True
        self._left = set(self._tensors)

    def take(self, name: str) -> Tensor | None:
        """Return the tensor; if it is absent, report a failure and return None."""
        if name not in self._tensors:
            if self.readable:
                self._report.fail(self.name, name, "is missing from the file")
            return None
        self._left.discard(name)
        return self._tensors[name]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self._tensors if name.startswith(prefix))

    def all(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors whose names start with a prefix, with the prefix removed, and mark them as checked."""
        for name in self.names(prefix):
            self._left.discard(name)
            yield name.removeprefix(prefix), self._tensors[name]

    def close(self) -> None:
        """Report every unchecked tensor as a failure."""
        for name in sorted(self._left):
            self._report.fail(self.name, name, "cannot be checked: unknown tensor in this layout")


def read_meta(folder: Path, name: str, report: ParityReport) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        report.fail(name, "file", f"cannot be read: {error}")
        return None
    if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
        report.fail(name, "config", "is missing")
        return None
    return meta
