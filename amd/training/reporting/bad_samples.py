"""Merge a run's bad samples across ranks, list them in `bad_samples.jsonl`, and check the allowed fraction."""

from __future__ import annotations

import json

from amd.data.faults import BadSampleLedger, DataFault, UnreadableSample
from amd.storage import exists, join, read_bytes, write_bytes
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import BAD_SAMPLES


class BadSamples:
    """Bad samples of a run, identical on every rank after each `share`."""

    def __init__(self, run_folder: str, group: ProcessGroup, limit_fraction: float, total: int) -> None:
        self._url = join(run_folder, BAD_SAMPLES)
        self._group, self._limit, self._total = group, limit_fraction, total
        self._ledger = BadSampleLedger(group.broadcast_from_main(self._read))
        self._pending: list[UnreadableSample] = []

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def too_many(self) -> bool:
        return self._ledger.exceeds(self._limit, self._total)

    def fault(self) -> DataFault:
        return self._ledger.fault(self._limit, self._total)

    def add(self, bad: list[UnreadableSample]) -> None:
        """Record bad samples found on this rank; they are counted after the next `share`."""
        self._pending += bad

    def share(self) -> None:
        """Merge bad samples across all ranks. Rewrites the whole file, since object stores cannot append."""
        everyone = self._group.gather(self._pending)
        self._pending = []
        new = self._ledger.add(bad for rank in everyone for bad in rank)
        if new and self._group.is_main:
            write_bytes(self._url, "".join(json.dumps(bad) + "\n" for bad in self._ledger).encode())

    def _read(self) -> list[UnreadableSample]:
        if not exists(self._url):
            return []
        return [json.loads(line) for line in read_bytes(self._url).decode().splitlines()]
