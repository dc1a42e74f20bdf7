"""Fetch the bytes of a sample: local files by path, remote files with retries and a cache.

Runs in the decoding process, because remote filesystem clients are not fork-safe. Decodes nothing.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from amd.data.fetching.cache import LocalCache
from amd.storage import filesystem, is_outage, is_remote, local_path, read_object

_T = TypeVar("_T")
# Errors that a retry does not fix.
_PERMANENT_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
)


class FetchError(Exception):
    """Raised for a file that cannot be read, with a one-sentence reason."""


class StoreOutage(FetchError):
    """Raised for a remote file whose store does not respond, so the file itself may be intact."""


class Fetcher:
    def __init__(
        self,
        retries: int = 3,
        cache: LocalCache | None = None,
        pause_s: float = 0.2,
        max_bytes: int | None = None,
    ) -> None:
        """Create a fetcher. Files larger than `max_bytes` are rejected before they are read."""
        self._retries, self._cache, self._pause, self._max_bytes = retries, cache, pause_s, max_bytes

    def fetch(self, location: str, offset: int | None = None, size: int | None = None) -> Path | bytes:
        """Return a local path, or the bytes of the whole file or of a range (`offset`, `size`).

        Raises FetchError if the file cannot be read, or StoreOutage if its store does not respond.
        """
        if is_remote(location):
            key = location if offset is None else f"{location}#{offset}+{size}"
            if self._cache is not None and (cached := self._cache.get(key)) is not None:
                return cached
            content = self._remote(location, offset, size)
            cached = None if self._cache is None else self._store(key, content)
            return content if cached is None else cached
        path = local_path(location)
        try:
            if offset is None:
                found = path.stat()
                if path.is_dir():
                    raise FetchError("is a folder, not a file")
                if self._max_bytes is not None:
                    if not path.is_file():
                        raise FetchError("is not a regular file")  # a pipe or a device has no end
                    self._check_size(found.st_size)
                return path
            with path.open("rb") as file:
                available = max(0, os.fstat(file.fileno()).st_size - offset)
                file.seek(offset if available else 0)
                content = file.read(min(size or 0, available))  # read() allocates the requested size at once
        except OSError as error:
            raise FetchError(_reason(error)) from None
        return _complete(content, size)

    def _check_size(self, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise FetchError(f"has {size} bytes, more than the limit of {self._max_bytes}")

    def _store(self, key: str, content: bytes) -> Path | None:
        try:
            return self._cache.put(key, content) if self._cache is not None else None
        except OSError:
            return None  # a full or read-only disk only makes later reads slower

    def _remote(self, location: str, offset: int | None, size: int | None) -> bytes:
        def read() -> bytes:
            fs, path = filesystem(location)
            if self._max_bytes is not None and offset is None:
                self._check_size(fs.size(path) or 0)
            end = None if offset is None else offset + (size or 0)
            return _complete(read_object(fs, path, offset, end), size)

        return self._retry(read)

    def _retry(self, read: Callable[[], _T]) -> _T:
        for attempt in range(self._retries + 1):
            try:
                return read()
            except _PERMANENT_ERRORS as error:
                raise FetchError(_reason(error)) from None
            except FetchError:
                raise
            except Exception as error:  # backends raise their own types for transient errors
                if attempt == self._retries:
                    attempts = f" after {attempt + 1} attempts" if attempt else ""
                    problem = StoreOutage if is_outage(error) else FetchError
                    raise problem(f"could not be read{attempts} ({type(error).__name__}: {error})") from None
                time.sleep(self._pause * 2**attempt * random.uniform(0.8, 1.2))
        raise AssertionError("unreachable")


def _complete(content: bytes, size: int | None) -> bytes:
    if size is not None and len(content) < size:
        raise FetchError(f"is truncated: {len(content)} of {size} bytes")
    return content


def _reason(error: BaseException) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "cannot be read (permission denied)"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not a file"
    return f"could not be read ({type(error).__name__}: {error})"
