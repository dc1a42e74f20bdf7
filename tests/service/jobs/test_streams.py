"""Tests for event streams: one read serves all streams of a job, and every stream is complete."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy import Engine

from service.db.models import Job, JobEvent
from service.jobs import streams
from service.jobs.actions import act
from service.jobs.store import JobStore
from service.jobs.streams import JobWatcher, job_events
from tests.support.service.fake_cluster import queued

WATCHING = 40


class CountingStore(JobStore):
    """Counts how often events are read."""

    reads = 0

    def events(self, *args: Any, **options: Any) -> Any:
        self.reads += 1
        return super().events(*args, **options)


def types(messages: list[str]) -> list[str]:
    data = [line.removeprefix("data: ") for text in messages for line in text.splitlines() if line.startswith("data: ")]
    return [found.get("type", found.get("state")) for found in map(json.loads, data)]


@pytest.mark.timeout(60)
def test_events_are_read_once_for_all_streams_of_a_job(sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "POLL_S", 0.02)
    store = CountingStore(sqlite_engine)
    job = queued(store)

    async def collect(after: int) -> list[str]:
        return [text async for text in job_events(watcher, store.get(job.id), after)]

    async def scenario() -> list[list[str]]:
        polling = asyncio.create_task(watcher.run())
        watching = [asyncio.create_task(collect(0)) for _ in range(WATCHING)]
        resumed = asyncio.create_task(collect(1))
        for action in ("pause", "resume", "cancel"):
            await asyncio.sleep(0.1)
            act(store, job.id, None, action, "me")  # type: ignore[arg-type]
        found = await asyncio.gather(*watching, resumed)
        polling.cancel()
        return found

    watcher = JobWatcher(store)
    *complete, resumed = asyncio.run(scenario())
    expected = ["created", "pause", "resume", "cancel", "cancelled"]
    assert [types(messages) for messages in complete] == [expected] * WATCHING
    assert types(resumed) == expected[1:]
    assert store.reads <= 4 * len(expected), f"{WATCHING} streams must not read {WATCHING} times"


@pytest.mark.timeout(60)
def test_a_failed_read_is_retried(sqlite_engine: Engine) -> None:
    store = JobStore(sqlite_engine)
    job = queued(store)
    watcher, failures = JobWatcher(store), [OSError("out")]
    read = watcher._read

    def failing(job_id: str, after: int) -> Any:
        if failures:
            raise failures.pop()
        return read(job_id, after)

    watcher._read = failing  # type: ignore[method-assign]

    async def scenario() -> tuple[Job, list[JobEvent]]:
        with watcher.subscribe(job.id):
            with pytest.raises(OSError, match="out"):
                await watcher.read(job.id, 0)
            found = await watcher.read(job.id, 0)
            return found.job, list(found.events)

    found, events = asyncio.run(scenario())
    assert (found.id, [event.type for event in events]) == (job.id, ["created"])
