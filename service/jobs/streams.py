"""Resumable server-sent event streams for jobs and logs. One poll of the database serves all subscribers.

`id:` is an event number or a byte offset in a log; a client that reconnects with `Last-Event-ID` receives every event
exactly once.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from amd.storage import StorageError
from service.db.models import Job, JobEvent
from service.jobs.execution.log_sources import LogSource
from service.jobs.schemas import DELETED, ENDED
from service.jobs.store import JobStore
from service.jobs.views import event_view
from service.web.bounded_calls import BoundedCalls
from service.web.errors import ClusterUnavailable, NotFound, StorageUnavailable

logger = logging.getLogger(__name__)

POLL_S = 0.5
KEEPALIVE_S = 15.0
RETRY_MS = 2000
KEEPALIVE = ": keep-alive\n\n"


class JobUpdate(NamedTuple):
    """A job and its events after a given version."""

    job: Job
    events: Sequence[JobEvent]


class JobWatcher:
    """Polls the jobs that have subscribers, reads each changed job once, and wakes its subscribers.

    Use only on the event loop.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._subscribers: dict[str, set[asyncio.Event]] = {}
        self._versions: dict[str, tuple[int, float]] = {}
        self._reads: dict[str, dict[int, asyncio.Task[JobUpdate]]] = {}  # since the last change, by job and version

    async def run(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if not self._subscribers:
                continue
            try:
                now = await run_in_threadpool(self._store.versions, list(self._subscribers))
            except Exception as error:  # the database may be unavailable for a while
                logger.warning("event streams cannot poll the database; will retry: %s", error)
                continue
            for job_id, events in list(self._subscribers.items()):
                if now.get(job_id) != self._versions.get(job_id):
                    self._versions[job_id] = now.get(job_id, (0, 0.0))
                    self._reads.pop(job_id, None)
                    for event in events:
                        event.set()

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._subscribers.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            self._subscribers[job_id].discard(event)
            if not self._subscribers[job_id]:
                del self._subscribers[job_id]
                self._versions.pop(job_id, None)
                self._reads.pop(job_id, None)

    async def read(self, job_id: str, after: int) -> JobUpdate:
        """Return a subscribed job and its events after version `after`, including at least the last known change.

        Subscribers with the same arguments share one read. Propagates database errors.
        """
        reads = self._reads.setdefault(job_id, {})
        if (reading := reads.get(after)) is None:
            reading = reads[after] = asyncio.create_task(run_in_threadpool(self._read, job_id, after))
        try:
            return await asyncio.shield(reading)
        except Exception:
            if reads.get(after) is reading:
                del reads[after]
            raise

    def _read(self, job_id: str, after: int) -> JobUpdate:
        events = self._store.events(job_id, after)
        return JobUpdate(self._store.get(job_id, deleted=True), events)


def message(event: str, data: Any, event_id: int | None = None) -> str:
    lines = [f"event: {event}", f"data: {json.dumps(data)}"]
    return "\n".join([f"id: {event_id}", *lines] if event_id is not None else lines) + "\n\n"


async def job_events(watcher: JobWatcher, job: Job, after: int) -> AsyncIterator[str]:
    """Stream a job's progress and its events, starting after a given event; send `end` once the job has ended."""
    yield f"retry: {RETRY_MS}\n\n"
    progress: Any = None
    with watcher.subscribe(job.id) as changed:
        while True:
            changed.clear()
            try:
                job, events = await watcher.read(job.id, after)
            except SQLAlchemyError:  # the stream outlives an outage of the database
                await asyncio.sleep(POLL_S)
                yield KEEPALIVE
                changed.set()
                continue
            for event in events:
                after = event.version
                yield message("job", event_view(event).model_dump(mode="json"), after)
            if job.progress and job.progress != progress:
                progress = job.progress
                yield message("progress", progress)
            if job.state in ENDED and after >= job.version:
                yield message("end", {"state": "deleted" if job.state in DELETED else job.state})
                return
            try:
                await asyncio.wait_for(changed.wait(), KEEPALIVE_S)
            except TimeoutError:
                yield KEEPALIVE


async def job_log(
    store: JobStore, calls: BoundedCalls, source: LogSource, job: Job, attempt: int, offset: int, interval_s: float
) -> AsyncIterator[str]:
    """Stream a log from an offset as it grows; send `end` once the attempt has ended.

    The stream survives outages of the storage root, Ray and the database.
    """
    yield f"retry: {RETRY_MS}\n\n"
    silent = 0.0
    while True:
        over = job.attempt > attempt or job.state not in ("starting", "running", "pausing", "cancelling")
        try:
            found = await calls.run(source.read, offset, not over)
        except (StorageUnavailable, ClusterUnavailable, StorageError):
            yield KEEPALIVE
        else:
            if found.end > offset:
                offset, silent = found.end, 0.0
                yield message("log", {"text": found.text}, offset)
                continue
            if over:
                yield message("end", {"state": job.state, "attempt": attempt})
                return
        await asyncio.sleep(interval_s)
        silent += interval_s
        if silent >= KEEPALIVE_S:
            silent = 0.0
            yield KEEPALIVE
        try:
            job = await run_in_threadpool(store.get, job.id)
        except SQLAlchemyError:
            yield KEEPALIVE
        except NotFound:
            yield message("end", {"state": "deleted", "attempt": attempt})
            return
