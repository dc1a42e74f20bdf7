"""A bounded LRU cache of remote files on the local disk.

Safe for concurrent use, even if a process is killed at any moment: files are renamed into place, and a file lock
(released by the kernel when its holder dies) serialises writers. The running total may overestimate the size until
the files are counted again, but never underestimates it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amd.file_lock import exclusive_lock

_EVICT_TO_FRACTION = 0.9  # evict down to this fraction of the limit, so that evictions stay rare


class LocalCache:
    """File cache: `get` returns a path or None; `put` stores a copy, or returns None if the file is too large."""

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.limit = limit_bytes
        self._files = self.folder / "files"

    def get(self, key: str) -> Path | None:
        path = self._path(key)
        try:
            os.utime(path)  # marks it as used; fails if it does not exist
        except OSError:
            return None
        return path

    def put(self, key: str, content: bytes) -> Path | None:
        if len(content) > self.limit:
            return None
        path = self._path(key)
        with self._exclusive_lock():
            if path.exists():
                return path
            total = self._total()
            if total + len(content) > self.limit:
                total = self._evict(len(content))
            incoming = self.folder / "incoming"  # one writer at a time; replaces a killed writer's leftover file
            incoming.write_bytes(content)
            self._set_total(total + len(content))
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(incoming, path)
        return path

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self._files / name[:2] / name

    @contextmanager
    def _exclusive_lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.folder / "lock"):
            yield

    def _total(self) -> int:
        try:
            return int((self.folder / "total").read_text())
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._entries())

    def _set_total(self, total: int) -> None:
        written = self.folder / "total.new"
        written.write_text(str(total))
        os.replace(written, self.folder / "total")

    def _evict(self, size: int) -> int:
        """Remove least recently used files until `size` more bytes fit, with a margin; return the remaining total."""
        files = sorted(self._entries())
        total = sum(size for _, size, _ in files)
        target = max(0, min(int(self.limit * _EVICT_TO_FRACTION), self.limit - size))
        for _, length, path in files:
            if total <= target:
                break
            path.unlink(missing_ok=True)
            total -= length
        return total

    def _entries(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in self._files.glob("*/*"):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        return found
