"""A run's bad samples: put together over ranks, named in `bad_samples.jsonl`, and too many at some point."""

from __future__ import annotations

import json

from amd.data.faults import Bad, BadSampleLedger, DataFault
from amd.storage import exists, join, read_bytes, write_bytes
from amd.training.process_group import Team
from amd.training.run_folder import BAD_SAMPLES


class BadSamples:
    """The same on every rank after each `share`."""

    def __init__(self, run_folder: str, team: Team, limit_fraction: float, total: int) -> None:
        self._url = join(run_folder, BAD_SAMPLES)
        self._team, self._limit, self._total = team, limit_fraction, total
        self._ledger = BadSampleLedger(team.from_leader(self._read))
        self._met: list[Bad] = []

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def too_many(self) -> bool:
        return self._ledger.over(self._limit, self._total)

    def fault(self) -> DataFault:
        return self._ledger.fault(self._limit, self._total)

    def meet(self, bad: list[Bad]) -> None:
        """What this rank came across; counted from the next `share` on."""
        self._met += bad

    def share(self) -> None:
        """All ranks tell each other. The file is written anew: stores of objects cannot append."""
        everyone = self._team.gather(self._met)
        self._met = []
        new = self._ledger.add(bad for rank in everyone for bad in rank)
        if new and self._team.leads:
            write_bytes(self._url, "".join(json.dumps(bad) + "\n" for bad in self._ledger).encode())

    def _read(self) -> list[Bad]:
        if not exists(self._url):
            return []
        return [json.loads(line) for line in read_bytes(self._url).decode().splitlines()]
