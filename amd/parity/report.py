"""Report of a replay: one row per comparison, with the largest deviation and its tolerance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Verdict = Literal["ok", "fail", "note"]


class ParityRow(NamedTuple):
    source: str
    """Golden file that contains the expected value."""
    name: str
    verdict: Verdict
    deviation: float | None = None
    """Largest absolute deviation; for a gradient, the relative L2 deviation."""
    tolerance: float | None = None
    used: float | None = None
    """Deviation as a fraction of the tolerance."""
    text: str = ""


@dataclass
class ParityReport:
    folder: str
    rows: list[ParityRow] = field(default_factory=list)

    @property
    def failures(self) -> list[ParityRow]:
        return [row for row in self.rows if row.verdict == "fail"]

    @property
    def ok(self) -> bool:
        """Whether at least one comparison was made and none failed."""
        return not self.failures and any(row.verdict == "ok" for row in self.rows)

    # Each comparison adds one row.

    def close(self, source: str, name: str, got: Any, golden: Any, tolerance: float) -> None:
        """Compare elementwise, within tolerance + tolerance * |golden|."""
        got, golden = _tensor(got), _tensor(golden)
        if self._other_shape(source, name, got, golden):
            return
        gap = (got.double() - golden.double()).abs()
        allowed = tolerance + tolerance * golden.double().abs()
        deviation = float(gap.max()) if gap.numel() else 0.0
        self._measured(source, name, deviation, tolerance, float((gap / allowed).max()) if gap.numel() else 0.0)

    def close_l2(self, source: str, name: str, got: Any, golden: Any, tolerance: float) -> None:
        """Compare the L2 norm of the difference, relative to the golden norm, because the scale of gradients varies."""
        got, golden = _tensor(got), _tensor(golden)
        if self._other_shape(source, name, got, golden):
            return
        gap, size = float((got.double() - golden.double()).norm()), float(golden.double().norm())
        deviation = gap / size if size > 0 else gap
        self._measured(source, name, deviation, tolerance, deviation / tolerance)

    def same(self, source: str, name: str, got: object, golden: object) -> None:
        """Compare for exact equality."""
        equal = torch.equal(got, golden) if isinstance(got, Tensor) and isinstance(golden, Tensor) else got == golden
        if equal:
            self.rows.append(ParityRow(source, name, "ok", 0.0, 0.0, 0.0))
        else:
            self.fail(source, name, f"is not equal: {_short(got)} computed, {_short(golden)} in the file")

    def fail(self, source: str, name: str, text: str) -> None:
        self.rows.append(ParityRow(source, name, "fail", text=text))

    def note(self, source: str, name: str, text: str) -> None:
        self.rows.append(ParityRow(source, name, "note", text=text))

    def _other_shape(self, source: str, name: str, got: Tensor, golden: Tensor) -> bool:
        if got.shape == golden.shape:
            return False
        self.fail(source, name, f"has shape {list(golden.shape)} in the file, {list(got.shape)} computed")
        return True

    def _measured(self, source: str, name: str, deviation: float, tolerance: float, used: float) -> None:
        # A NaN deviation is not within the tolerance.
        self.rows.append(ParityRow(source, name, "ok" if used <= 1 else "fail", deviation, tolerance, used))

    # Output for people and for programs

    def summary(self) -> str:
        compared = [row for row in self.rows if row.verdict == "ok" or row.deviation is not None]
        if not compared and not self.failures:
            return f"{self.folder}: nothing compared"
        worst = max((row for row in compared if row.used is not None), key=lambda row: row.used or 0.0, default=None)
        text = f"{self.folder}: {len(compared)} compared, {len(self.failures)} failed"
        if worst is not None and worst.used is not None:
            text += f"; closest to its tolerance: {worst.source} {worst.name} ({worst.used:.1%} of it)"
        return text

    def as_json(self) -> str:
        rows = [{k: _plain(v) for k, v in row._asdict().items() if v not in (None, "")} for row in self.rows]
        return json.dumps({"folder": self.folder, "ok": self.ok, "failed": len(self.failures), "rows": rows})

    def lines(self) -> list[str]:
        """Return one line per row, followed by the failures again and a summary."""
        width = max((len(f"{row.source} {row.name}") for row in self.rows), default=0)
        lines = [_line(row, width) for row in self.rows]
        if self.failures:
            lines += ["", "Failed:", *(_line(row, width) for row in self.failures)]
        return [*lines, "", self.summary()]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _line(row: ParityRow, width: int) -> str:
    what = f"{row.source} {row.name}".ljust(width)
    numbers = ""
    if row.deviation is not None and row.tolerance is not None:
        numbers = f"{row.deviation:9.2e} of {row.tolerance:.0e}" if row.tolerance else "     same"
    return f"{row.verdict.upper() if row.verdict == 'fail' else row.verdict:4}  {what}  {numbers}{row.text}".rstrip()


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = repr(sorted(value) if isinstance(value, (set, Sequence)) and not isinstance(value, str) else value)
    return text if len(text) <= 160 else f"{text[:157]}…"
