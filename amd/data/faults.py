"""Unreadable samples and the limit on their number, and damaged samples. Performs no I/O.

An unreadable sample is counted, reported and skipped, never replaced silently. A damaged one is counted and reported
apart from those, and used as far as it decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypedDict, TypeVar


class UnreadableSample(TypedDict):
    """A sample that could not be read, with the reason."""

    record: int  # index in the manifest
    location: str
    reason: str


class DamagedSample(TypedDict):
    """A video of which only the frames that decode are used, with the damage."""

    record: int  # index in the manifest
    location: str
    reason: str


S = TypeVar("S", UnreadableSample, DamagedSample)


class DataFault(Exception):
    """Raised when too many samples cannot be read. The message lists them with reasons and how to fix them."""


class LoaderCrash(RuntimeError):
    """Raised when a loader or decoding process was killed or crashed, not because of a particular sample."""


class SampleLedger(Generic[S]):
    """Samples of a run, each recorded once. A resumed run starts with the samples that it has already recorded."""

    def __init__(self, known: Iterable[S] = ()) -> None:
        self._samples: dict[int, S] = {}
        self.add(known)

    def add(self, samples: Iterable[S]) -> list[S]:
        """Record samples; return the new ones in order."""
        new = []
        for sample in samples:
            if sample["record"] not in self._samples:
                self._samples[sample["record"]] = sample
                new.append(sample)
        return new

    def __contains__(self, record: int) -> bool:
        return record in self._samples

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[S]:
        return iter(self._samples.values())


class BadSampleLedger(SampleLedger[UnreadableSample]):
    """Unreadable samples of a run.

    Ranks read different samples, so they exchange their records (`add`) before checking `exceeds`; all ranks then stop
    at the same step.
    """

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
