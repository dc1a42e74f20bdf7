"""Tests for cached reads: values are fresh while the database responds, and remain in use while it does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from service.db.cached_reads import CachedReads

OUT = OperationalError("SELECT", {}, Exception("out"))


class CachedDatabase:
    """A one-value database that can fail or hang, and its cache, whose clock tests can set."""

    def __init__(self) -> None:
        self.value, self.error, self.now, self.reads = "old", None, 0.0, 0
        self.answers = threading.Event()
        self.answers.set()
        self.error: Exception | None = None
        self.cache = CachedReads[str, str](self._read, ttl_s=10, outage_s=100, threads=2, clock=lambda: self.now)

    def _read(self, key: str) -> str:
        self.reads += 1
        self.answers.wait(60)
        if self.error is not None:
            raise self.error
        return self.value

    async def at(self, now: float) -> str:
        """Return the value at the given time, and wait for any background read unless the database hangs."""
        self.now = now
        found = await self.cache.get("key")
        while self.answers.is_set() and self.cache._reads:
            await asyncio.sleep(0)
        return found


def run(scenario: Callable[[CachedDatabase], Coroutine[Any, Any, None]]) -> None:
    database = CachedDatabase()
    try:
        asyncio.run(scenario(database))
    finally:
        database.answers.set()


def test_a_value_is_at_most_as_old_as_its_time_to_live() -> None:
    async def scenario(database: CachedDatabase) -> None:
        assert await database.at(0) == "old"
        database.value = "new"
        assert await database.at(4) == "old"
        assert database.reads == 1
        assert await database.at(6) == "old"  # and read again in the background
        assert database.reads == 2
        assert await database.at(7) == "new"
        database.value = "newest"
        assert await database.at(17) == "newest", "the first request after a long pause waits for a new read"

    run(scenario)


def test_known_values_remain_in_use_for_a_limited_time_while_the_database_is_down() -> None:
    async def scenario(database: CachedDatabase) -> None:
        assert await database.at(0) == "old"
        database.error, database.value = OUT, "new"
        assert await database.at(50) == "old"
        assert await database.at(99) == "old"
        with pytest.raises(OperationalError):
            await database.at(101)
        database.error = None
        assert await database.at(102) == "new"

    run(scenario)


def test_a_single_read_waits_without_blocking_requests_while_the_database_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.db.cached_reads.PATIENCE_S", 0.01)

    async def scenario(database: CachedDatabase) -> None:
        assert await database.at(0) == "old"
        database.value = "new"
        database.answers.clear()
        for now in range(11, 90):
            assert await database.at(now) == "old"
        assert database.reads == 2
        database.answers.set()
        await database.at(90)
        assert await database.at(91) == "new"

    run(scenario)


def test_a_value_deleted_from_the_database_is_no_longer_used() -> None:
    async def scenario(database: CachedDatabase) -> None:
        assert await database.at(0) == "old"
        database.error = KeyError("revoked")
        assert await database.at(6) == "old"
        with pytest.raises(KeyError):
            await database.at(6)

    run(scenario)


def test_a_forgotten_value_is_read_again_even_if_a_read_is_in_progress() -> None:
    async def scenario(database: CachedDatabase) -> None:
        assert await database.at(0) == "old"
        database.answers.clear()
        assert await database.at(6) == "old"
        pending = database.cache._reads["key"]
        database.cache.forget(lambda key, value: value == "old")
        database.value = "new"
        database.answers.set()
        await pending
        database.value = "newer"
        assert await database.at(6) == "newer"

    run(scenario)
