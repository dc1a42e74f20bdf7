"""Server-sent events: one look at the database serves all who watch, and a stream goes on where it broke off.

`id:` is an event's number, or a log's byte; a client that comes back with `Last-Event-ID` misses and repeats nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool

from service.db.models import Job
from service.jobs import logs
from service.jobs.execution.protocol import JobFolder
from service.jobs.schemas import ENDED
from service.jobs.store import JobStore
from service.jobs.views import event_view
from service.web.errors import NotFound

logger = logging.getLogger(__name__)

LOOK_S = 0.5
BEAT_S = 15.0
RETRY_MS = 2000


class Hub:
    """Wakes those who watch a job when it has changed."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._seen: dict[str, tuple[int, float]] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._waiting:
                continue
            try:
                now = await run_in_threadpool(self._store.versions, list(self._waiting))
            except Exception as error:  # the database may be away for a while
                logger.warning("streams cannot look at the database for now: %s", error)
                continue
            for job_id, events in list(self._waiting.items()):
                if now.get(job_id) != self._seen.get(job_id):
                    self._seen[job_id] = now.get(job_id, (0, 0.0))
                    for event in events:
                        event.set()

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._waiting.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
                self._seen.pop(job_id, None)


def message(event: str, data: Any, event_id: int | None = None) -> str:
    lines = [f"event: {event}", f"data: {json.dumps(data)}"]
    return "\n".join([f"id: {event_id}", *lines] if event_id is not None else lines) + "\n\n"


async def job_events(store: JobStore, hub: Hub, job: Job, after: int) -> AsyncIterator[str]:
    """What has happened after that event, what happens, progress between, and `end` once the job has ended."""
    yield f"retry: {RETRY_MS}\n\n"
    progress: Any = None
    with hub.watch(job.id) as changed:
        while True:
            changed.clear()
            events = await run_in_threadpool(store.events, job.id, after)
            for event in events:
                after = event.version
                yield message("job", event_view(event).model_dump(mode="json"), after)
            try:
                job = await run_in_threadpool(store.get, job.id)
            except NotFound:
                yield message("end", {"state": "deleted"})
                return
            if job.progress and job.progress != progress:
                progress = job.progress
                yield message("progress", progress)
            if job.state in ENDED and after >= job.version:
                yield message("end", {"state": job.state})
                return
            try:
                await asyncio.wait_for(changed.wait(), BEAT_S)
            except TimeoutError:
                yield ": still here\n\n"


async def job_log(store: JobStore, folder: JobFolder, job: Job, attempt: int, offset: int) -> AsyncIterator[str]:
    """An attempt's log from an offset on, as it grows; `end` when that attempt has ended and all of it was sent."""
    yield f"retry: {RETRY_MS}\n\n"
    silent = 0.0
    while True:
        over = job.attempt > attempt or job.state not in ("starting", "running", "pausing", "cancelling")
        piece = await run_in_threadpool(logs.read, folder, attempt, offset, whole_lines=not over)
        if piece.end > offset:
            offset, silent = piece.end, 0.0
            yield message("log", {"text": piece.text}, offset)
            continue
        if over:
            yield message("end", {"state": job.state, "attempt": attempt})
            return
        await asyncio.sleep(folder.pause_s)
        silent += folder.pause_s
        if silent >= BEAT_S:
            silent = 0.0
            yield ": still here\n\n"
        try:
            job = await run_in_threadpool(store.get, job.id)
        except NotFound:
            yield message("end", {"state": "deleted", "attempt": attempt})
            return
