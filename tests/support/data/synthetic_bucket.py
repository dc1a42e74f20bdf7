"""An fsspec filesystem that synthesises listings, and counts the requests and response bytes they would take on S3.

`synthetic://data/10x130` is a folder of 10 class folders with 130 images each; the files have no content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem

PAGE = 1000  # keys per list request
KEY_BYTES = 300  # bytes of XML per key, in addition to its name: ETag, size, time, storage class
_ROOT = re.compile(r"data/(\d+)x(\d+)")


class SyntheticBucket(AbstractFileSystem):
    protocol = "synthetic"
    requests: ClassVar[int] = 0
    """Number of list requests made by this process."""
    bytes: ClassVar[int] = 0
    """Total size of the responses in bytes."""

    @classmethod
    def reset(cls) -> None:
        cls.requests = cls.bytes = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("synthetic://").strip("/")

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        names = list(_files(self._strip_protocol(path)))
        self._count(names)
        return {name: _info(name, "file") for name in names} if detail else names

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        path = self._strip_protocol(path)
        match = _ROOT.fullmatch(path)
        if match is None:
            found = [_info(name, "file") for name in _files(path)]
        else:
            found = [_info(f"{path}/class {n:05d}", "directory") for n in range(int(match[1]))]
        if not found:
            raise FileNotFoundError(path)
        self._count([str(info["name"]) for info in found])
        return found if detail else [info["name"] for info in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path.endswith(".jpg"):
            return _info(path, "file")
        self._count([path])
        if _ROOT.match(path) is None:
            raise FileNotFoundError(path)
        return _info(path, "directory")

    @classmethod
    def _count(cls, names: list[str]) -> None:
        cls.requests += max(1, -(-len(names) // PAGE))
        cls.bytes += sum(map(len, names)) + KEY_BYTES * len(names)


def register() -> None:
    fsspec.register_implementation("synthetic", SyntheticBucket, clobber=True)


def _files(path: str) -> Iterator[str]:
    match = _ROOT.match(path)
    if match is None:
        return
    for folder in range(int(match[1])):
        prefix = f"{match[0]}/class {folder:05d}"
        if prefix.startswith(path) or path.startswith(prefix):
            yield from (f"{prefix}/image_{folder:05d}_{n:08d}.jpg" for n in range(int(match[2])))


def _info(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "size": 100_000 if kind == "file" else 0, "type": kind}
