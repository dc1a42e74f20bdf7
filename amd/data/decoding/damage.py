"""Damage in a partly decodable video, as plain values sent by the decoding process. Imports no decoder."""

from __future__ import annotations

from typing import NamedTuple


class Damage(NamedTuple):
    """Reason and extent of the damage in a partly decodable video."""

    reason: str
    usable: int
    """Number of frames that decode and reference only frames that also decode."""
    decoded: int
    """Number of frames that decode."""
    total: int
    """Number of frames whose packets are in the file."""

    def __str__(self) -> str:
        unused = self.decoded - self.usable
        others = f", of which {unused} reference damaged frames" if unused else ""
        return f"{self.reason}; {self.decoded} of {self.total} frames decode{others}"

    def is_above(self, min_share: float) -> bool:
        """Return whether no frame is usable, or less than `min_share` of the frames decode."""
        return not self.usable or self.decoded < min_share * self.total
