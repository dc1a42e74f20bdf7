"""Cache for database reads that every request needs: API keys and deployments.

While the database responds, a value is at most `ttl_s` old. While it does not respond, cached values stay in use for up
to `outage_s`, so requests that need nothing else from the database are still served. Values are read in dedicated
threads, which other API requests cannot occupy. Works with values of any type.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

from anyio import CapacityLimiter, to_thread
from cachetools import LRUCache
from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

PATIENCE_S = 1.0  # how long a request waits for a new value if it may use an expired one


class _Entry(NamedTuple, Generic[V]):
    value: V
    read_at: float
    """Time at which the read began; later changes may be missing from the value."""


class CachedReads(Generic[K, V]):
    """Cached values by key, all read with the same function. Use only on the event loop."""

    def __init__(
        self,
        read: Callable[[K], V],
        *,
        ttl_s: float,
        outage_s: float,
        threads: int,
        size: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read`: blocking function. If it raises, nothing is cached; SQLAlchemyError means the database is down."""
        self._read, self._ttl_s, self._outage_s, self._clock = read, ttl_s, outage_s, clock
        self._limiter = CapacityLimiter(threads)
        self._entries: LRUCache[K, _Entry[V]] = LRUCache(size)
        self._reads: dict[K, asyncio.Task[V]] = {}  # at most one per key
        self._is_out = False

    async def get(self, key: K) -> V:
        """Return the value for a key. Propagates any error from `read`."""
        entry = self._entries.get(key)
        age = self._clock() - entry.read_at if entry is not None else float("inf")
        if entry is not None and age < self._ttl_s / 2:
            return entry.value
        reading = self._reads.get(key) or self._start(key)
        if entry is None or age >= max(self._outage_s, self._ttl_s):
            return await asyncio.shield(reading)
        if age >= self._ttl_s and not self._is_out:
            await asyncio.wait({reading}, timeout=PATIENCE_S)
            if reading.done() and not isinstance(reading.exception(), SQLAlchemyError):
                return reading.result()
            self._is_out = True  # until a read succeeds, so that later requests do not wait as well
        return entry.value

    def forget(self, matches: Callable[[K, V], bool]) -> None:
        """Remove matching entries and discard the results of reads in progress, which may be outdated."""
        for key, entry in list(self._entries.items()):
            if matches(key, entry.value):
                del self._entries[key]
                self._reads.pop(key, None)

    def _start(self, key: K) -> asyncio.Task[V]:
        reading = self._reads[key] = asyncio.create_task(self._run(key))
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting for it
        return reading

    async def _run(self, key: K) -> V:
        current, began = asyncio.current_task(), self._clock()
        try:
            value = await to_thread.run_sync(self._read, key, limiter=self._limiter)
            if self._reads.get(key) is current:
                self._entries[key] = _Entry(value, began)
            self._is_out = False
            return value
        except SQLAlchemyError as error:
            if not self._is_out:
                logger.warning("the database does not respond; cached values stay in use: %s", error)
            self._is_out = True
            raise
        except Exception:
            if self._reads.get(key) is current:
                self._entries.pop(key, None)
            raise
        finally:
            if self._reads.get(key) is current:
                del self._reads[key]
