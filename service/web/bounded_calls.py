"""Run blocking calls to one dependency, such as the storage root, in separate threads with a timeout.

A dependency that hangs blocks only its own threads; other requests are unaffected. A call that makes no progress within
the timeout is abandoned, and its thread stays occupied until the call returns. While all threads are occupied, further
calls are rejected immediately.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import ParamSpec, TypeVar

from service.web.errors import ServiceError

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_call: contextvars.ContextVar[_Call] = contextvars.ContextVar("bounded_call")
_END = object()


class _Call:
    """A call, and when it last made progress."""

    def __init__(self) -> None:
        self.progress_at = time.monotonic()


def report_progress() -> None:
    """Extend the timeout of the call that this thread is running, if any. Useful for calls that read many files."""
    if (call := _call.get(None)) is not None:
        call.progress_at = time.monotonic()


def with_progress(items: Iterable[T]) -> Iterator[T]:
    """Yield the items; each one extends the timeout of the call that this thread is running."""
    for item in items:
        report_progress()
        yield item


class BoundedCalls:
    """Runs blocking calls to one dependency."""

    def __init__(self, name: str, threads: int, timeout_s: float, error: Callable[[str], ServiceError]) -> None:
        """`error` builds the exception for an abandoned or rejected call from a message for the caller."""
        self.name, self.threads, self._timeout_s, self._error = name, threads, timeout_s, error
        self._pool = ThreadPoolExecutor(threads, name)
        self._lock = threading.Lock()
        self._running: set[_Call] = set()

    @property
    def running(self) -> int:
        """Number of occupied threads."""
        return len(self._running)

    async def run(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call the function and return its result, or raise its exception. If the call hangs, raise a ServiceError."""
        call, future = self._submit(lambda: function(*args, **options))
        waiting = asyncio.wrap_future(future)
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting for it
        while not waiting.done():
            remaining = call.progress_at + self._timeout_s - time.monotonic()
            if remaining <= 0:
                future.cancel()
                raise self._hangs()
            await asyncio.wait({waiting}, timeout=remaining)
        return waiting.result()

    def run_from_thread(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Like `run`, but blocks. Must not be called on the event loop or from one of these threads."""
        call, future = self._submit(lambda: function(*args, **options))
        while True:
            remaining = call.progress_at + self._timeout_s - time.monotonic()
            try:
                return future.result(max(0.0, remaining))
            except FutureTimeout:
                if future.done():
                    raise  # the function's own error
                if remaining <= 0:
                    future.cancel()
                    raise self._hangs() from None

    def map_from_thread(self, function: Callable[[S], T], items: Sequence[S]) -> list[T | Exception]:
        """Call the function for each item, and return each result or exception. All calls share one timeout. Blocks."""
        try:
            futures = [self._submit(partial(function, item))[1] for item in items]
        except ServiceError as error:  # all threads are occupied
            return [error] * len(items)
        ended = wait(futures, self._timeout_s).done
        results = list[T | Exception]()
        for future in futures:
            if future not in ended:
                future.cancel()  # no-op unless it waits for a thread
                results.append(self._hangs())
                continue
            result = _result_or_error(future)
            results.append(result)
        return results

    async def iterate(self, items: Iterator[T]) -> AsyncIterator[T]:
        """Yield the items of a blocking iterator. The timeout applies to each item separately."""
        while (item := await self.run(next, items, _END)) is not _END:
            yield item  # type: ignore[misc]  # not the end

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, function: Callable[[], T]) -> tuple[_Call, Future[T]]:
        with self._lock:
            stuck_since = time.monotonic() - self._timeout_s
            stuck = sum(call.progress_at < stuck_since for call in self._running)
        if stuck >= self.threads:
            raise self._hangs()
        call = _Call()
        context = contextvars.copy_context()
        return call, self._pool.submit(context.run, self._work, call, function)

    def _work(self, call: _Call, function: Callable[[], T]) -> T:
        _call.set(call)
        with self._lock:
            self._running.add(call)
        try:
            return function()
        finally:
            with self._lock:
                self._running.discard(call)

    def _hangs(self) -> ServiceError:
        return self._error(f"the {self.name} did not respond within {self._timeout_s:g} s; try again")


def _result_or_error(future: Future[T]) -> T | Exception:
    error = future.exception()
    assert error is None or isinstance(error, Exception)
    return future.result() if error is None else error
