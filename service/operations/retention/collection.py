"""Garbage collection: plan what a retention policy removes, and remove it unless it is a dry run.

Each removal is checked again before it starts, since users keep working during a collection. Every step may be
repeated: after a crash, the reconciler finishes the deletion of any job that is still `deleting`, and the next plan
includes any remaining files. Only one control plane collects at a time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import CursorResult, delete
from sqlalchemy.orm import Session

from amd.storage import StorageError, join, remove_empty_folders, remove_file
from amd.training.lease import Lease
from amd.training.run_folder import LEASE, run_folder
from service.background import StepMonitor
from service.db.leases import LeaseKeeper, run_steps
from service.db.models import GarbageCollection, Job
from service.jobs.schemas import DELETED, ENDED
from service.jobs.store import SERVICE, JobStore, StaleJob
from service.operations.retention.history import record_collection
from service.operations.retention.inventory import live_references, old_rows, take_inventory
from service.operations.retention.plan import Removal, plan_removals
from service.operations.retention.policy import RetentionPolicy
from service.web.errors import CollectionRunning, NotFound

logger = logging.getLogger(__name__)

TASK, LOOP_TASK = "gc", "retention"
INTERVAL_S = 3600.0  # between periodic collections
POLL_S = 5.0  # between attempts to acquire the loop's lease
CLOCK_MARGIN_S = 60.0  # by which the clocks of control planes may differ


class CollectionResult(NamedTuple):
    """Result of a garbage collection."""

    removals: list[Removal]
    """Removals that were made or, in a dry run, that would be made."""
    skipped: int
    """Number of planned removals that were not made: the objects were in use, had changed or could not be removed."""


def collect(
    root: str,
    policy: RetentionPolicy,
    store: JobStore | None = None,
    *,
    dry_run: bool,
    actor: str = SERVICE,
    clock: Callable[[], float] = time.time,
    on_progress: Callable[[], None] = lambda: None,
) -> CollectionResult:
    """Apply a policy to a storage root and, with a store, to its database. `on_progress` is called between removals.

    Raises CollectionRunning if another collection is running. Propagates StorageError and SQLAlchemyError.
    """
    lease = LeaseKeeper(store.engine, TASK) if store is not None and not dry_run else None
    with lease.renewing() if lease is not None else contextlib.nullcontext():
        if lease is not None and not lease.acquire():
            raise CollectionRunning("another garbage collection is running; try again once it has ended")
        now = clock()
        planned = plan_removals(take_inventory(root, policy, now, store.engine if store else None), policy)
        if dry_run:
            return CollectionResult(planned, 0)
        collector = _Collector(root, policy, store, now, actor, lambda: lease is None or lease.is_held)
        removed = []
        for removal in planned:
            if collector.remove(removal):
                removed.append(removal)
            on_progress()
    logger.info(
        "garbage collection removed %d of %d items, %d bytes",
        len(removed),
        len(planned),
        sum(each.size for each in removed),
    )
    skipped = len(planned) - len(removed)
    if store is not None:
        collection = GarbageCollection(
            started_at=now,
            ended_at=clock(),
            actor=actor,
            items=len(removed),
            skipped=skipped,
            files=sum(len(each.paths) for each in removed),
            bytes=sum(each.size for each in removed),
            rows=sum(each.rows for each in removed),
        )
        record_collection(store.engine, collection, len(planned))
    return CollectionResult(removed, skipped)


class _Collector:
    def __init__(
        self,
        root: str,
        policy: RetentionPolicy,
        store: JobStore | None,
        planned_at: float,
        actor: str,
        may_continue: Callable[[], bool],
    ) -> None:
        self._root, self._policy, self._store = root, policy, store
        self._planned_at, self._actor, self._may_continue = planned_at, actor, may_continue

    def remove(self, removal: Removal) -> bool:
        """Make a removal. Returns False if it is no longer possible or, after an error, must be repeated."""
        if not self._may_continue():
            return False
        try:
            if self._is_in_use(removal):
                return False
            if removal.kind == "jobs":
                return self._remove_job(removal)
            if removal.rows:
                return self._remove_rows(removal)
            self._remove_files(removal.paths)
            return True
        except StorageError as error:
            logger.warning("%s of %s cannot be removed now: %s", removal.kind, removal.id, error)
            return False

    def _is_in_use(self, removal: Removal) -> bool:
        """Whether a process or job has started to use the objects since their removal was planned."""
        if any(Lease(join(run_folder(self._root, run), LEASE)).taken_by() for run in removal.run_ids):
            return True
        if self._store is None:
            return False
        ids = {removal.id, *removal.run_ids} - {""}
        return not ids.isdisjoint(live_references(self._store.engine, ids, self._planned_at - CLOCK_MARGIN_S))

    def _remove_job(self, removal: Removal) -> bool:
        assert self._store is not None
        try:
            job = self._store.get(removal.id)
            if job.state not in ENDED - DELETED:
                return False
            fields: dict[str, Any] = {"wanted": "delete", "state": "deleting", "message": "removing its files"}
            job = self._store.change(job, "delete", actor=self._actor, **fields)
            self._remove_files(removal.paths)
            self._store.finish_deletion(job)
        except (NotFound, StaleJob):
            return False
        return True

    def _remove_rows(self, removal: Removal) -> bool:
        assert self._store is not None
        if removal.id:
            conditions: list[tuple[Any, tuple[Any, ...]]] = [(Job, (Job.id == removal.id, Job.state == "deleted"))]
        else:
            rows = old_rows(self._policy, self._planned_at)
            conditions = [(table, where) for kind, table, where in rows if kind == removal.kind]
        with Session(self._store.engine) as session, session.begin():
            results = [session.execute(delete(table).where(*where)) for table, where in conditions]
        return any(isinstance(result, CursorResult) and result.rowcount for result in results)

    def _remove_files(self, paths: Sequence[str]) -> None:
        for path in paths:
            remove_file(join(self._root, path))
        for folder in {"/".join(path.split("/")[:2]) for path in paths}:
            remove_empty_folders(join(self._root, folder))


class RetentionLoop:
    """Applies the configured policy periodically."""

    def __init__(
        self, store: JobStore, root: str, policy: RetentionPolicy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._root, self._policy, self._clock = store, root, policy, clock
        self._collected_at = float("-inf")
        self.lease, self.monitor = LeaseKeeper(store.engine, LOOP_TASK), StepMonitor(LOOP_TASK)

    def run(self, stop: threading.Event) -> None:
        """Collect until `stop` is set. Any error is logged, and the next collection retries."""
        run_steps(
            self.step,
            stop,
            POLL_S,
            self.lease,
            self.monitor,
            on_error=lambda _: logger.exception("garbage collection failed; the next one retries"),
        )

    def step(self) -> bool:
        """Collect if a collection is due. Returns whether this process holds the loop's lease."""
        if not self.lease.acquire():
            return False
        if self._clock() - self._collected_at >= INTERVAL_S:
            self._collected_at = self._clock()
            with contextlib.suppress(CollectionRunning):
                collect(self._root, self._policy, self._store, dry_run=False, on_progress=self._report_progress)
        return True

    def _report_progress(self) -> None:
        with self.monitor.step():
            pass
