"""Records of unreadable and damaged samples, and the limit on unreadable samples. Performs no I/O.

Unreadable samples are counted, reported and skipped, never replaced silently. Damaged samples are counted and reported
separately; their decodable frames are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Generic, NamedTuple, Self, TypeAlias, TypedDict, TypeVar

from amd.storage import StorageUnreachable


class UnreadableSample(TypedDict):
    """A sample that could not be read, with the reason."""

    record: int  # index in the manifest
    location: str
    reason: str


class DamagedSample(TypedDict):
    """A damaged video whose decodable frames are used, with a description of the damage."""

    record: int  # index in the manifest
    location: str
    reason: str


class FaultySamples(NamedTuple):
    """Unreadable samples, and damaged samples that were partly used."""

    bad: list[UnreadableSample]
    damaged: list[DamagedSample]

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """Concatenate the samples found on several ranks."""
        bad, damaged = zip(*parts, strict=True)
        return cls([*chain.from_iterable(bad)], [*chain.from_iterable(damaged)])


BAD_SAMPLES_REMEDY = "fix them, remove them from the data, or raise the limit"

S = TypeVar("S", UnreadableSample, DamagedSample)


class DataFault(Exception):
    """Raised when too many samples cannot be read. The message lists the samples, the reasons and the remedy."""


class LoaderCrash(RuntimeError):
    """Raised when a loader or decoding process dies for a reason unrelated to a particular sample."""


LoadingFault: TypeAlias = DataFault | LoaderCrash | StorageUnreachable


class SampleLedger(Generic[S]):
    """Faulty samples of a run, each recorded once. A resumed run starts with the samples recorded earlier."""

    def __init__(self, known: Iterable[S] = ()) -> None:
        self._samples: dict[int, S] = {}
        self.add(known)

    def add(self, samples: Iterable[S]) -> list[S]:
        """Record samples; return the samples that had not been recorded before, in order."""
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
        """Return the error for an exceeded limit, with counts, the first `shown` samples and the remedy."""
        lines = [f"  {bad['location']}: {bad['reason']}" for bad in list(self)[:shown]]
        if len(self) > shown:
            lines.append(f"  … and {len(self) - shown} more")
        return DataFault(
            f"{len(self)} of {total} samples cannot be read, more than data.max_bad_fraction={limit_fraction} allows: "
            f"{BAD_SAMPLES_REMEDY}\n" + "\n".join(lines)
        )
