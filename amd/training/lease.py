"""One writer per run: a small file that says who trains it, renewed while they live.

Two processes that trained the same run at once would overwrite each other's checkpoints. The file is created only where
there is none (exclusively on disk, by a conditional put on S3); a holder that has not renewed it for `STALE_S`, or that
is a dead process of this very machine, has lost it. Knows nothing of what the run does.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from amd.storage import filesystem, is_remote, local_path, patiently, read_bytes, remove, write_bytes

STALE_S = 90.0
RENEW_S = 15.0

logger = logging.getLogger(__name__)


class Lease:
    """`with Lease(url):` holds the file; `taken_by()` says who has it before one tries."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        """Take the lease, or say that another holds it."""
        holder = self.taken_by()
        if holder is not None:
            return False
        if not patiently(self.url, lambda: _create(self.url, self._body())):
            if self.taken_by() is not None:
                return False
            write_bytes(self.url, self._body())  # its holder is gone, or is this one, whose first try had no answer
        time.sleep(0 if not is_remote(self.url) else 0.2)  # let a rival's write land, then see who was last
        if self._read().get("token") != self._token:
            return False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return True

    def taken_by(self) -> dict[str, Any] | None:
        """Who holds the lease, if anyone alive does: host, pid, since."""
        holder = self._read()
        if not holder or holder.get("token") == self._token:
            return None
        if time.time() - holder["renewed"] > STALE_S:
            return None
        here = holder["host"] == socket.gethostname()
        return None if here and not _alive(holder["pid"], holder["born"]) else holder

    def holder(self) -> str:
        """Who holds it, in words; whoever was refused a moment ago may already find it free."""
        found = self.taken_by() or {"host": "another machine", "pid": "?"}
        return f"process {found['pid']} on {found['host']}"

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            try:
                if self._read().get("token") == self._token:
                    remove(self.url)
            except Exception as error:  # it grows stale by itself
                logger.warning("the run's lease could not be given back: %s", error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __enter__(self) -> Lease:
        return self

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                write_bytes(self.url, self._body())
            except Exception as error:  # the store may be away for a while; the run itself notices if it stays so
                logger.warning("the run's lease could not be renewed: %s", error)

    def _read(self) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(read_bytes(self.url))
            return value
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _body(self) -> bytes:
        pid = os.getpid()
        value = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": pid,
            "born": _born(pid),
            "renewed": time.time(),
        }
        return json.dumps(value).encode()


def _create(url: str, body: bytes) -> bool:
    """Write a file that does not exist yet; whether it was so."""
    if not is_remote(url):
        path = local_path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(body)
        return True
    fs, path_in_store = filesystem(url)
    try:
        fs.pipe_file(path_in_store, body, mode="create")
    except FileExistsError:
        return False
    except (TypeError, NotImplementedError):  # a store without conditional writes: the last writer wins
        if fs.exists(path_in_store):
            return False
        fs.pipe_file(path_in_store, body)
    return True


def _born(pid: int) -> str | None:
    """When a process of this machine began, so that a pid used again is not taken for it. None where unknown."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _alive(pid: int, born: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _born(pid) == born
