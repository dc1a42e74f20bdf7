"""What is wrong with samples, and when it is too much. Pure.

A bad sample is counted, named and passed over; never replaced in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypedDict


class Bad(TypedDict):
    """A sample that could not be read."""

    record: int  # its number in the manifest
    location: str
    reason: str


class DataFault(Exception):
    """Too many samples cannot be read. The message says which, why, and what to do."""


class LoaderCrash(RuntimeError):
    """A reading process ended by itself: killed, out of memory, or crashed. Not the fault of any one sample."""


class BadSampleLedger:
    """The bad samples of a run, each once however often it was met.

    Ranks see different samples: they put theirs together (`add` of what the others met) before they ask `over`, so that
    all stop at the same step. A run taken up again starts from the lines it wrote before.
    """

    def __init__(self, known: Iterable[Bad] = ()) -> None:
        self._bad: dict[int, Bad] = {}
        self.add(known)

    def add(self, bad: Iterable[Bad]) -> list[Bad]:
        """Take them in; returns those not known before, in order."""
        new = []
        for sample in bad:
            if sample["record"] not in self._bad:
                self._bad[sample["record"]] = sample
                new.append(sample)
        return new

    def __len__(self) -> int:
        return len(self._bad)

    def __iter__(self) -> Iterator[Bad]:
        return iter(self._bad.values())

    def over(self, limit_fraction: float, total: int) -> bool:
        """Whether more than this fraction of `total` records is bad."""
        return len(self) > limit_fraction * total

    def fault(self, limit_fraction: float, total: int, shown: int = 20) -> DataFault:
        """What to raise once it is over: the numbers, the list (its first lines), the remedy."""
        lines = [f"  {bad['location']}: {bad['reason']}" for bad in list(self)[:shown]]
        if len(self) > shown:
            lines.append(f"  and {len(self) - shown} more")
        return DataFault(
            f"{len(self)} of {total} samples cannot be read, more than data.max_bad_fraction={limit_fraction} allows: "
            "mend them, take them out of the list, or raise the limit\n" + "\n".join(lines)
        )
