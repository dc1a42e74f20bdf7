"""Fetch remote files before they are decoded, several at a time, so that decoding does not wait for storage.

The total size of fetched files and fetches in progress is bounded; until a file of unknown size has been fetched, it is
assumed to be as large as the largest recent file. Requesting a file that is still queued fetches it directly, and a
fetch error is raised only when the file is requested, so results are the same as without read-ahead. Runs in the
decoding process. Decodes nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from amd.data.fetching.fetch import Fetcher, FetchError
from amd.storage import is_remote

THREADS = 96  # a reader of 70 clips/s from frame folders needs 55 files in flight at 50 ms per request


class FileRange(NamedTuple):
    """A file, or the `size` bytes that start at `offset`."""

    location: str
    offset: int | None = None
    size: int | None = None


class _Fetch:
    """A fetch in progress or completed, and the bytes reserved for its result."""

    def __init__(self, reserved: int) -> None:
        self.reserved = reserved
        self.is_wanted = True
        self.result: Future[Path | bytes] = Future()


class ReadAhead:
    """Fetches files with a Fetcher, either on request or in advance.

    `expect` replaces the queue of files to fetch ahead, `start` adds files at the front of the queue, and `fetch`
    returns a file. Not thread-safe.
    """

    def __init__(self, fetcher: Fetcher, limit_bytes: int) -> None:
        self._fetcher, self._limit = fetcher, limit_bytes
        self._lock = threading.Lock()
        self._queue: deque[FileRange] = deque()
        self._fetches: dict[FileRange, _Fetch] = {}
        self._reserved = 0
        self._estimate = 0  # for files of unknown size: the largest size so far, decaying with every fetch
        self._pool: ThreadPoolExecutor | None = None

    @property
    def held_bytes(self) -> int:
        """Total size in bytes of fetched files, plus an estimate for files still being fetched."""
        return self._reserved

    def expect(self, files: Iterable[FileRange]) -> None:
        """Fetch these files ahead of use, in this order, and discard all other files."""
        expected = self._remote(files)
        with self._lock:
            for file in [file for file in self._fetches if file not in expected]:
                self._forget(file)
            self._queue = deque(file for file in expected if file not in self._fetches)
            self._start_fetches()

    def start(self, files: Iterable[FileRange]) -> None:
        """Fetch these files before the expected files."""
        needed = self._remote(files)
        with self._lock:
            rest = [file for file in self._queue if file not in needed]
            self._queue = deque([*(file for file in needed if file not in self._fetches), *rest])
            self._start_fetches()

    def fetch(self, location: str, offset: int | None = None, size: int | None = None) -> Path | bytes:
        """Return a local path or bytes, like Fetcher.fetch. Raises FetchError if the file cannot be read."""
        file = FileRange(location, offset, size)
        with self._lock:
            ahead = self._fetches.get(file)
            if ahead is None and file in self._queue:
                self._queue.remove(file)
        if ahead is None:
            return self._fetcher.fetch(*file)
        error = ahead.result.exception()
        with self._lock:
            self._forget(file)
            self._start_fetches()
        if isinstance(error, FetchError):
            raise error
        if error is not None:  # such as too little memory for more than one file
            return self._fetcher.fetch(*file)
        found = ahead.result.result()
        if isinstance(found, Path) and not found.exists():  # evicted from the local cache in the meantime
            return self._fetcher.fetch(*file)
        return found

    def discard(self, files: Iterable[FileRange]) -> None:
        """Drop these files, which are no longer needed, whether they are queued or fetched."""
        with self._lock:
            for file in files:
                if file in self._fetches:
                    self._forget(file)
                elif file in self._queue:
                    self._queue.remove(file)
            self._start_fetches()

    def _remote(self, files: Iterable[FileRange]) -> dict[FileRange, None]:
        return dict.fromkeys(file for file in files if is_remote(file.location)) if self._limit else {}

    # The methods below are called with the lock held.

    def _start_fetches(self) -> None:
        while self._queue:
            file = self._queue[0]
            estimate = file.size or self._estimate or self._limit  # the first file of unknown size is fetched alone
            if self._reserved + estimate > self._limit and (self._reserved or file.size):
                return
            self._queue.popleft()
            self._fetches[file] = fetch = _Fetch(estimate)
            self._reserved += estimate
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, "read-ahead")
            self._pool.submit(self._run, file, fetch)

    def _forget(self, file: FileRange) -> None:
        fetch = self._fetches.pop(file)
        fetch.is_wanted = False
        if fetch.result.done():
            self._release(fetch, 0)

    def _release(self, fetch: _Fetch, kept: int) -> None:
        self._reserved += kept - fetch.reserved
        fetch.reserved = kept

    # The method below runs in a pool thread.

    def _run(self, file: FileRange, fetch: _Fetch) -> None:
        found: Path | bytes = b""
        error: BaseException | None = None
        if fetch.is_wanted:
            try:
                found = self._fetcher.fetch(*file)
            except BaseException as raised:  # raised again by `fetch`
                error = raised
        size = len(found) if isinstance(found, bytes) else 0
        with self._lock:
            self._estimate = max(self._estimate * 9 // 10, size)
            self._release(fetch, size if fetch.is_wanted else 0)
            if error is None:
                fetch.result.set_result(found)
            else:
                fetch.result.set_exception(error)
            self._start_fetches()


def frame_files(location: str, numbers: Sequence[int], frame_name: str) -> list[FileRange]:
    """Return the files that contain these frames of a frame folder; frame 0 is file number 1."""
    folder = location.rstrip("/").rpartition("/")[2]
    return [FileRange(f"{location}/{frame_name.format(number + 1, folder=folder)}") for number in numbers]
