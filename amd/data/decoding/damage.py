"""Damage of a video of which some frames decode. Plain values, sent by the decoding process. Imports no decoder."""

from __future__ import annotations

from typing import NamedTuple


class Damage(NamedTuple):
    """What is wrong with a video of which only some frames are used."""

    reason: str
    usable: int
    """Frames that decode and reference only frames that also decode."""
    decoded: int
    """Frames that decode."""
    total: int
    """Frames whose packets the file contains."""

    def __str__(self) -> str:
        unused = self.decoded - self.usable
        others = f", of which {unused} refer to damaged ones" if unused else ""
        return f"{self.reason}; {self.decoded} of {self.total} frames decode{others}"

    def is_above(self, min_share: float) -> bool:
        """Return whether too few frames decode."""
        return not self.usable or self.decoded < min_share * self.total
