"""Tests that calls to a hung dependency are abandoned and do not occupy threads that other requests need."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from service.web.bounded_calls import BoundedCalls, report_progress, with_progress
from service.web.errors import StorageUnavailable

TIMEOUT_S = 0.1
THREADS = 3


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """An event that is set on teardown, so that functions waiting for it return."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def calls(hang: threading.Event) -> BoundedCalls:
    return BoundedCalls("storage root", THREADS, TIMEOUT_S, StorageUnavailable)


def test_a_call_returns_its_functions_result_or_raises_its_error(calls: BoundedCalls) -> None:
    def fail() -> None:
        raise TimeoutError("raised by the function")

    assert asyncio.run(calls.run(divmod, 7, 2)) == (3, 1)
    assert calls.run_from_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(TimeoutError, match="raised by the function"):
        asyncio.run(calls.run(fail))
    with pytest.raises(TimeoutError, match="raised by the function"):
        calls.run_from_thread(fail)


def test_a_hung_call_is_abandoned_and_later_calls_are_rejected_until_a_thread_is_free(
    calls: BoundedCalls, hang: threading.Event
) -> None:
    started = threading.Semaphore(0)

    def wait() -> None:
        started.release()
        hang.wait(60)

    async def fail(times: int) -> None:
        for error in await asyncio.gather(*(calls.run(wait) for _ in range(times)), return_exceptions=True):
            assert isinstance(error, StorageUnavailable)
            assert "storage root did not respond within 0.1 s" in error.message

    asyncio.run(fail(4 * THREADS))
    for _ in range(THREADS):
        assert started.acquire(timeout=10)
    with pytest.raises(StorageUnavailable):
        calls.run_from_thread(wait)
    assert not started.acquire(blocking=False), "no call may start while every thread hangs"
    hang.set()
    while calls.running:
        pass
    assert calls.run_from_thread(lambda: 1) == 1


@pytest.mark.slow
def test_a_call_that_makes_progress_may_take_longer_than_the_timeout() -> None:
    timeout_s, pauses = 1.0, threading.Event()  # long enough for a thread that has to wait for the processor
    calls = BoundedCalls("storage root", THREADS, timeout_s, StorageUnavailable)

    def read_many_files() -> int:
        for _ in with_progress(range(6)):
            pauses.wait(timeout_s / 5)
            report_progress()
        return 6

    assert asyncio.run(calls.run(read_many_files)) == 6
    assert calls.run_from_thread(read_many_files) == 6


def test_an_iterator_yields_items_in_order_until_an_outage_ends_it(calls: BoundedCalls, hang: threading.Event) -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        hang.wait(60)

    async def read() -> None:
        async for item in calls.iterate(items()):
            found.append(item)

    found = list[int]()
    with pytest.raises(StorageUnavailable):
        asyncio.run(read())
    assert found == [1, 2]


def test_concurrent_hung_calls_cost_one_timeout_in_total(calls: BoundedCalls, hang: threading.Event) -> None:
    def read(number: int) -> int:
        if number == 1:
            hang.wait(60)
        if number == 2:
            raise ValueError("damaged")
        return number

    first, second, third, fourth = calls.map_from_thread(read, range(4))
    assert (first, fourth) == (0, 3)
    assert isinstance(second, StorageUnavailable)
    assert isinstance(third, ValueError)
