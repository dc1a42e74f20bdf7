"""A reconciler with a job store and a fake cluster, but without HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from service.db.leases import LeaseKeeper
from service.db.models import Job
from service.jobs.execution.external import ExternalRunDiscovery
from service.jobs.execution.reconciler import Reconciler
from service.jobs.store import JobStore
from service.registry.discovery import EncoderDiscovery
from service.registry.scanner import StorageScanner
from service.registry.store import EncoderStore
from service.settings import Settings
from service.web.bounded_calls import BoundedCalls
from service.web.errors import StorageUnavailable
from tests.support.service.fake_cluster import FakeCluster, queued, report_status

STORAGE_THREADS = 16


class FakeControlPlane:
    """A job store, a fake cluster, and a clock that tests can advance.

    The lease and the timeout for storage calls are long, because a busy machine may pause a test for many seconds.
    """

    storage_timeout_s = 300.0

    def __init__(self, engine: Engine, root: Path, **settings: Any) -> None:
        self.store, self.cluster, self.root, self.offset_s = JobStore(engine), FakeCluster(), str(root), 0.0
        self.settings = Settings(storage=self.root, data_dir=root, **settings)
        self.reconciler = self.replica()
        self.scanner = StorageScanner(
            ExternalRunDiscovery(self.store, self.cluster, self.root, lambda: time.time() + self.offset_s),
            EncoderDiscovery(EncoderStore(engine), self.root),
            LeaseKeeper(engine, "discovery"),
        )

    def replica(self) -> Reconciler:
        encoders = EncoderDiscovery(EncoderStore(self.store.engine), self.root)
        reconciler = Reconciler(self.store, self.cluster, self.settings, encoders, lambda: time.time() + self.offset_s)
        reconciler.lease = LeaseKeeper(self.store.engine, "reconciler", seconds=3600.0)
        reconciler._storage = BoundedCalls("storage root", STORAGE_THREADS, self.storage_timeout_s, StorageUnavailable)
        return reconciler

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.reconciler.step()

    def now(self, job: Job) -> Job:
        return self.store.get(job.id)

    def running(self, **fields: Any) -> Job:
        job = queued(self.store, **fields)
        self.step()
        report_status(self.root, self.now(job))
        self.step()
        assert self.now(job).state == "running"
        return self.now(job)
