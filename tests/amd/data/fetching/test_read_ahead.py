"""Reading ahead changes when files are fetched but not what is returned, and uses a bounded amount of memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.data.fetching.fetch import Fetcher, FetchError
from amd.data.fetching.read_ahead import FileRange, ReadAhead

SIZES = [0, 1, 10, 60, 100, 250]  # of files 0 to 5; file 6 does not exist, and reading file 7 ahead raises MemoryError


class StubFetcher(Fetcher):
    """Fetches files of known sizes, and records which fetches run in the main thread."""

    def __init__(self, pause_s: float = 0.0, barrier: threading.Barrier | None = None) -> None:
        super().__init__()
        self.pause_s, self.barrier = pause_s, barrier
        self.fetched: list[str] = []
        self.in_main_thread: list[str] = []

    def fetch(self, location: str, offset: int | None = None, size: int | None = None) -> Path | bytes:
        is_main = threading.current_thread() is threading.main_thread()
        (self.in_main_thread if is_main else self.fetched).append(location)
        if self.barrier is not None:
            self.barrier.wait(10)
        time.sleep(self.pause_s)
        number = int(location.rpartition("/")[2])
        if number == 6:
            raise FetchError("does not exist")
        if number == 7 and not is_main:
            raise MemoryError
        content = bytes([number]) * (SIZES[number] if number < 6 else 5)
        return content if offset is None else content[offset : offset + (size or 0)]


def url(number: int) -> str:
    return f"s3://bucket/{number}"


def result(fetcher: Fetcher | ReadAhead, number: int) -> object:
    try:
        return fetcher.fetch(url(number))
    except FetchError as error:
        return str(error)


NUMBERS = st.integers(0, 7)
STEPS = st.lists(
    st.tuples(st.just("expect"), st.lists(NUMBERS, max_size=8))
    | st.tuples(st.just("start"), st.lists(NUMBERS, max_size=4))
    | st.tuples(st.just("discard"), st.lists(NUMBERS, max_size=4))
    | st.tuples(st.just("fetch"), st.lists(NUMBERS, min_size=1, max_size=4)),
    max_size=12,
)


@settings(max_examples=60)
@given(STEPS, st.sampled_from([0, 1, 70, 1000]))
def test_files_and_errors_match_direct_reads_in_any_order(steps: list[tuple[str, list[int]]], limit: int) -> None:
    ahead, direct = ReadAhead(StubFetcher(), limit), StubFetcher()
    for action, numbers in steps:
        if action == "fetch":
            for number in numbers:
                assert result(ahead, number) == result(direct, number)
        else:
            getattr(ahead, action)([FileRange(url(number)) for number in numbers])
        assert ahead.held_bytes <= limit + sum(SIZES), "only files that are larger than estimated exceed the limit"
    ahead.expect([])
    while ahead.held_bytes:
        time.sleep(0.001)  # until fetches that have already started end


def test_expected_files_are_fetched_concurrently_and_only_once() -> None:
    fetcher = StubFetcher(barrier=threading.Barrier(4))  # broken unless four fetches wait at the same time
    ahead = ReadAhead(fetcher, 1000)
    files = [FileRange(url(1), offset=0, size=1)._replace(location=url(number)) for number in (1, 2, 3, 4)]
    ahead.expect(files)
    assert [ahead.fetch(*file) for file in files] == [bytes([number]) for number in (1, 2, 3, 4)]
    assert sorted(fetcher.fetched) == [url(number) for number in (1, 2, 3, 4)]
    assert fetcher.in_main_thread == []


def test_the_total_size_of_fetched_files_is_bounded() -> None:
    fetcher = StubFetcher()
    ahead = ReadAhead(fetcher, 150)
    files = [FileRange(f"s3://bucket/{copy}/3") for copy in range(20)]  # 60 bytes each
    ahead.expect(files)
    for file in files:
        time.sleep(0.002)
        assert ahead.held_bytes <= 150
        assert len(fetcher.fetched) <= files.index(file) + 2
        assert ahead.fetch(*file) == b"\3" * 60
    assert ahead.held_bytes == 0


def test_files_that_are_no_longer_expected_are_freed() -> None:
    ahead = ReadAhead(StubFetcher(), 1000)
    ahead.expect([FileRange(url(number)) for number in (1, 2, 3)])
    ahead.expect([FileRange(url(2))])
    assert ahead.fetch(url(2)) == b"\2" * 10
    while ahead.held_bytes:
        time.sleep(0.001)


def test_a_file_that_the_local_cache_has_evicted_is_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "evicted"
    path.touch()
    found: list[Path | bytes] = [b"again", path]

    class CachingFetcher(Fetcher):
        def fetch(self, location: str, offset: int | None = None, size: int | None = None) -> Path | bytes:
            return found.pop()

    ahead = ReadAhead(CachingFetcher(), 1000)
    ahead.expect([FileRange("s3://bucket/a")])
    while len(found) > 1:
        time.sleep(0.001)
    path.unlink()
    assert ahead.fetch("s3://bucket/a") == b"again"


@pytest.mark.parametrize(("location", "limit"), [("/local/1", 1000), (url(1), 0)])
def test_a_file_is_read_directly_if_it_is_local_or_the_limit_is_0(location: str, limit: int) -> None:
    fetcher = StubFetcher()
    ahead = ReadAhead(fetcher, limit)
    ahead.expect([FileRange(location)])
    ahead.start([FileRange(location)])
    assert ahead.fetch(location) == b"\1"
    assert (fetcher.fetched, fetcher.in_main_thread) == ([], [location])
