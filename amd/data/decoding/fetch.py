"""The bytes of a sample, from wherever they are: local paths as they are, remote ones with retries and a cache.

Runs in the process that decodes: filesystems of remote storage must not cross a fork. Knows nothing of decoding.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from amd.data.decoding.cache import LocalCache
from amd.storage import filesystem, is_remote, local_path

_T = TypeVar("_T")
# Asking again does not change these.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError)


class FetchError(Exception):
    """A file that could not be read; one sentence."""


class Fetcher:
    def __init__(
        self,
        retries: int = 3,
        cache: LocalCache | None = None,
        pause_s: float = 0.2,
        max_bytes: int | None = None,
    ) -> None:
        """`max_bytes`: larger whole files are refused before they are read."""
        self._retries, self._cache, self._pause, self._max_bytes = retries, cache, pause_s, max_bytes

    def fetch(self, location: str, offset: int | None = None, size: int | None = None) -> Path | bytes:
        """A local path to read, or bytes: the whole file, or `size` bytes from `offset`. Raises FetchError."""
        if is_remote(location):
            key = location if offset is None else f"{location}#{offset}+{size}"
            if self._cache is not None and (kept := self._cache.get(key)) is not None:
                return kept
            content = self._remote([location], offset, size)[0]
            kept = None if self._cache is None else self._keep(key, content)
            return content if kept is None else kept
        path = local_path(location)
        try:
            if offset is None:
                found = path.stat()
                if path.is_dir():
                    raise FetchError("is a folder, not a file")
                if self._max_bytes is not None:
                    if not path.is_file():
                        raise FetchError("is no ordinary file")  # a pipe or a device has no end
                    self._check_size(found.st_size)
                return path
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(size or 0)
        except OSError as error:
            raise FetchError(_reason(error)) from None
        return _whole(content, size)

    def fetch_many(self, locations: Sequence[str]) -> list[Path | bytes]:
        """Several files; remote ones are asked for at once."""
        if self._cache is not None or not locations or not is_remote(locations[0]):
            return [self.fetch(location) for location in locations]
        return list(self._remote(locations, None, None))

    def _check_size(self, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise FetchError(f"has {size} bytes, more than {self._max_bytes}")

    def _keep(self, key: str, content: bytes) -> Path | None:
        try:
            return self._cache.put(key, content) if self._cache is not None else None
        except OSError:
            return None  # a full or read-only disk costs speed, not samples

    def _remote(self, locations: Sequence[str], offset: int | None, size: int | None) -> list[bytes]:
        def read() -> list[bytes]:
            fs, path = filesystem(locations[0])
            if len(locations) > 1:
                paths = [filesystem(location)[1] for location in locations]
                found: dict[str, Any] = fs.cat(paths, on_error="raise")
                return [bytes(found[path]) for path in paths]
            if self._max_bytes is not None and offset is None:
                self._check_size(fs.size(path) or 0)
            end = None if offset is None else offset + (size or 0)
            return [_whole(bytes(fs.cat_file(path, start=offset, end=end)), size)]

        return self._again(read)

    def _again(self, read: Callable[[], _T]) -> _T:
        for attempt in range(self._retries + 1):
            try:
                return read()
            except _FINAL as error:
                raise FetchError(_reason(error)) from None
            except FetchError:
                raise
            except Exception as error:  # every backend has its own kinds for what passes
                if attempt == self._retries:
                    tries = f" after {attempt + 1} attempts" if attempt else ""
                    raise FetchError(f"could not be read{tries} ({type(error).__name__}: {error})") from None
                time.sleep(self._pause * 2**attempt * random.uniform(0.8, 1.2))
        raise AssertionError("unreachable")


def _whole(content: bytes, size: int | None) -> bytes:
    if size is not None and len(content) < size:
        raise FetchError(f"is cut short: {len(content)} of {size} bytes")
    return content


def _reason(error: BaseException) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read (no permission)"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not a file"
    return f"could not be read ({type(error).__name__}: {error})"
