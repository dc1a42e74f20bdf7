"""Unreadable samples and the limit on their number. Performs no I/O.

An unreadable sample is counted, reported and skipped, never replaced silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypedDict


class UnreadableSample(TypedDict):
    """A sample that could not be read, with the reason."""

    record: int  # index in the manifest
    location: str
    reason: str


class DataFault(Exception):
    """Raised when too many samples cannot be read. The message lists them with reasons and how to fix them."""


class LoaderCrash(RuntimeError):
    """Raised when a loader or decoding process was killed or crashed, not because of a particular sample."""


class BadSampleLedger:
    """Unreadable samples of a run, each recorded once.

    Ranks read different samples, so they exchange their records (`add`) before checking `exceeds`; all ranks then stop
    at the same step. A resumed run starts with the samples that it has already recorded.
    """

    def __init__(self, known: Iterable[UnreadableSample] = ()) -> None:
        self._bad: dict[int, UnreadableSample] = {}
        self.add(known)

    def add(self, bad: Iterable[UnreadableSample]) -> list[UnreadableSample]:
        """Record samples; return the new ones in order."""
        new = []
        for sample in bad:
            if sample["record"] not in self._bad:
                self._bad[sample["record"]] = sample
                new.append(sample)
        return new

    def __len__(self) -> int:
        return len(self._bad)

    def __iter__(self) -> Iterator[UnreadableSample]:
        return iter(self._bad.values())

    def exceeds(self, limit_fraction: float, total: int) -> bool:
        """Return whether more than `limit_fraction` of `total` records are unreadable."""
        return len(self) > limit_fraction * total

    def fault(self, limit_fraction: float, total: int, shown: int = 20) -> DataFault:
        """Return the error for an exceeded limit: counts, the first `shown` samples, and how to fix them."""
        lines = [f"  {bad['location']}: {bad['reason']}" for bad in list(self)[:shown]]
        if len(self) > shown:
            lines.append(f"  … and {len(self) - shown} more")
        return DataFault(
            f"{len(self)} of {total} samples cannot be read, more than data.max_bad_fraction={limit_fraction} allows: "
            "fix them, remove them from the list, or raise the limit\n" + "\n".join(lines)
        )
