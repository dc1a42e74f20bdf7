"""An fsspec filesystem that serves a local folder as remote storage: `remote:///folder/file`.

Every request takes `AMD_TEST_LATENCY_S` seconds and is appended as a line to the file `AMD_TEST_REQUESTS`, if set. A
request for a file named `kill-once…` kills the process halfway through the first download.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

LATENCY, REQUESTS = "AMD_TEST_LATENCY_S", "AMD_TEST_REQUESTS"


class RemoteFolder(LocalFileSystem):
    protocol = "remote"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("remote://").rstrip("/") or "/"

    def unstrip_protocol(self, name: str) -> str:
        return f"remote://{name}"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._request("info", path)
        return dict(super().info(path))

    def ls(self, path: str, detail: bool = False, **_: Any) -> Any:
        self._request("ls", path)
        return super().ls(path, detail)

    def get_file(self, rpath: str, lpath: str, *_: Any, **__: Any) -> None:
        self._request("get", rpath)
        content = Path(self._strip_protocol(rpath)).read_bytes()
        target, marker = Path(lpath), Path(self._strip_protocol(rpath) + ".killed")
        if "kill-once" in rpath and not marker.exists():
            marker.touch()
            target.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        target.write_bytes(content)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._request("get", path if start is None else f"{path} {start}-{end}")
        with Path(self._strip_protocol(path)).open("rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))

    @staticmethod
    def _request(kind: str, path: str) -> None:
        time.sleep(float(os.environ.get(LATENCY, 0)))
        if log := os.environ.get(REQUESTS):
            with open(log, "a") as file:
                file.write(f"{kind} {path}\n")


def register() -> None:
    fsspec.register_implementation("remote", RemoteFolder, clobber=True)
