"""Merge a run's bad and damaged samples across ranks, list them in the run folder, and check the allowed fraction.

bad_samples.jsonl       samples that could not be read
damaged_samples.jsonl   videos for which only the decodable frames are used
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from amd.data.faults import BadSampleLedger, DamagedSample, DataFault, SampleLedger, UnreadableSample
from amd.storage import exists, join, read_bytes, write_json_lines
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import BAD_SAMPLES, DAMAGED_SAMPLES


class BadSamples:
    """A run's bad and damaged samples, identical on every rank after each `share`. `len` counts only bad samples."""

    def __init__(self, run_folder: str, group: ProcessGroup, limit_fraction: float, total: int) -> None:
        self._urls = (join(run_folder, BAD_SAMPLES), join(run_folder, DAMAGED_SAMPLES))
        self._group, self._limit, self._total = group, limit_fraction, total
        bad, damaged = group.broadcast_from_main(lambda: tuple(_read(url) for url in self._urls))
        self._ledger, self._damaged = BadSampleLedger(bad), SampleLedger[DamagedSample](damaged)
        self._pending: tuple[list[UnreadableSample], list[DamagedSample]] = ([], [])

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def damaged(self) -> int:
        """Number of damaged samples."""
        return len(self._damaged)

    @property
    def too_many(self) -> bool:
        return self._ledger.exceeds(self._limit, self._total)

    def fault(self) -> DataFault:
        return self._ledger.fault(self._limit, self._total)

    def add(self, bad: Iterable[UnreadableSample], damaged: Iterable[DamagedSample] = ()) -> int:
        """Record samples found on this rank, which count from the next `share` on; return the number of new samples."""
        new_bad, new_damaged = list(bad), [sample for sample in damaged if sample["record"] not in self._damaged]
        self._pending[0].extend(new_bad)
        self._pending[1].extend(new_damaged)
        return len(new_bad) + len(new_damaged)

    def share(self) -> None:
        """Merge samples across all ranks. Rewrites whole files, since object stores cannot append."""
        everyone = self._group.gather(self._pending)
        self._pending = ([], [])
        new_bad = self._ledger.add(sample for bad, _ in everyone for sample in bad)
        new_damaged = self._damaged.add(sample for _, damaged in everyone for sample in damaged)
        if not self._group.is_main:
            return
        for url, new, ledger in zip(self._urls, (new_bad, new_damaged), (self._ledger, self._damaged), strict=True):
            if new:
                write_json_lines(url, ledger)


def _read(url: str) -> list[Any]:
    return [json.loads(line) for line in read_bytes(url).decode().splitlines()] if exists(url) else []
