"""Periodically measure how much each project stores: the files of its runs, jobs and encoders.

Separate from requests and from the scheduler, because listing a large storage root takes a long time. Only one of
several control planes measures at a time. A run belongs to its job's project, and a run without a job to the project it
was started for.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from amd.storage import StorageError, join, read_many, walk_files
from amd.training.run_folder import FACTS, run_folder
from service.background import StepMonitor
from service.db.batches import in_batches
from service.db.leases import LeaseKeeper, run_steps
from service.db.models import Job, RegisteredEncoder
from service.projects.storage import StoredBytesStore
from service.web.schemas import DEFAULT_PROJECT
from tune_spaces.ledger import sweep_of

logger = logging.getLogger(__name__)

TASK = "storage-meter"
INTERVAL_S = 900.0
POLL_S = 5.0  # between attempts to acquire the lease
SECTIONS = ("runs", "jobs", "encoders")


class StorageMeter:
    """Measures how much each project stores, at most once every INTERVAL_S seconds."""

    def __init__(self, engine: Engine, root: str, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._root, self._clock = engine, root, clock
        self._store, self._measured_at = StoredBytesStore(engine), float("-inf")
        self.lease, self.monitor = LeaseKeeper(engine, TASK), StepMonitor(TASK)

    def run(self, stop: threading.Event) -> None:
        """Measure until `stop` is set. Any error is logged, and the next measurement retries."""
        run_steps(
            self.step,
            stop,
            POLL_S,
            self.lease,
            self.monitor,
            on_error=lambda _: logger.exception("project storage cannot be measured; will retry"),
        )

    def step(self) -> bool:
        """Measure if a measurement is due. Returns whether this process holds the lease."""
        if not self.lease.acquire():
            return False
        now = self._clock()
        if abs(now - self._measured_at) >= INTERVAL_S:
            self._measured_at = now
            try:
                self._store.replace(self._measure(), now)
            except StorageError as error:
                logger.warning("project storage cannot be measured: %s", error)
        return True

    def _measure(self) -> dict[str, int]:
        sizes = Counter[str]()  # by ID of a run, job or encoder
        for section in SECTIONS:
            for path, file in walk_files(join(self._root, section)).items():
                sizes[path.partition("/")[0]] += file.size
        owners, found = self._owners(sizes), Counter[str]()
        for id, size in sizes.items():
            found[owners.get(id, DEFAULT_PROJECT)] += size
        return dict(found)

    def _owners(self, ids: Iterable[str]) -> Mapping[str, str]:
        """Map each job and encoder ID with a known owner to its project."""
        with Session(self._engine.execution_options(reads_only=True)) as session:
            jobs = dict(session.execute(select(Job.id, Job.project)).tuples().all())
            owners = dict(session.execute(select(RegisteredEncoder.id, RegisteredEncoder.project)).tuples().all())
        owners |= jobs
        trials = {id: sweep for id in ids if (sweep := sweep_of(id)) is not None and sweep in jobs}
        owners |= {id: jobs[sweep] for id, sweep in trials.items()}
        for batch in in_batches(id for id in ids if id not in owners):
            urls = {join(run_folder(self._root, id), FACTS): id for id in batch}
            for url, content in read_many(list(urls)).items():
                facts = _parsed(content)
                owners[urls[url]] = jobs.get(str(facts.get("job")), str(facts.get("project") or DEFAULT_PROJECT))
        return owners


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
