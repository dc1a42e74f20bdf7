"""Read a run's bad and damaged samples from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from amd.storage import exists, join, read_bytes
from amd.training.run_folder import BAD_SAMPLES, DAMAGED_SAMPLES, run_folder
from service.jobs.details.schemas import SampleFault, SampleFaults


def sample_faults(root: str, job_id: str, limit: int) -> SampleFaults:
    """Return at most `limit` samples: bad samples first, then damaged samples."""
    folder = run_folder(root, job_id)
    bad, damaged = (list(_read(join(folder, name))) for name in (BAD_SAMPLES, DAMAGED_SAMPLES))
    items = [*(_view(row, False) for row in bad), *(_view(row, True) for row in damaged)]
    return SampleFaults(items=items[:limit], bad=len(bad), damaged=len(damaged))


def _read(url: str) -> Iterator[dict[str, Any]]:
    if exists(url):
        yield from (json.loads(line) for line in read_bytes(url).decode().splitlines())


def _view(row: dict[str, Any], damaged: bool) -> SampleFault:
    return SampleFault(
        record=row.get("record"), location=row.get("location", ""), message=row.get("reason", ""), damaged=damaged
    )
