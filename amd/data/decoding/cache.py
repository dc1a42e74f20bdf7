"""A bounded folder of remote files on the local disk, least recently used first out.

Safe with many processes and with kill -9 at any moment: files appear whole by a rename, one process at a time writes
(a lock the kernel gives back when its holder dies), and the running total errs only upwards until the next count.
Knows nothing of where files come from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SPARE = 0.9  # an eviction makes room down to this fraction, so that it is rare


class LocalCache:
    """`get(key)` gives a path or None; `put(key, content)` keeps a copy and gives its path; None if it is too big."""

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.limit = limit_bytes
        self._files = self.folder / "files"

    def get(self, key: str) -> Path | None:
        path = self._path(key)
        try:
            os.utime(path)  # marks it as used, and tells whether it is there
        except OSError:
            return None
        return path

    def put(self, key: str, content: bytes) -> Path | None:
        if len(content) > self.limit:
            return None
        path = self._path(key)
        with self._only_one():
            if path.exists():
                return path
            total = self._total()
            if total + len(content) > self.limit:
                total = self._make_room(len(content))
            incoming = self.folder / "incoming"  # one writer at a time; what a killed one left is overwritten
            incoming.write_bytes(content)
            self._set_total(total + len(content))
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(incoming, path)
        return path

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self._files / name[:2] / name

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _total(self) -> int:
        try:
            return int((self.folder / "total").read_text())
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._count())

    def _set_total(self, total: int) -> None:
        written = self.folder / "total.new"
        written.write_text(str(total))
        os.replace(written, self.folder / "total")

    def _make_room(self, size: int) -> int:
        """Remove the least recently used until `size` more fits with some to spare; the bytes that stay."""
        files = sorted(self._count())
        total = sum(size for _, size, _ in files)
        aim = max(0, min(int(self.limit * _SPARE), self.limit - size))
        for _, length, path in files:
            if total <= aim:
                break
            path.unlink(missing_ok=True)
            total -= length
        return total

    def _count(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in self._files.glob("*/*"):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        return found
