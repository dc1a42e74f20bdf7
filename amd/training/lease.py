"""Ensure that a run has only one writer, using a lease file that identifies the writer and is renewed while it runs.

Two processes training the same run would overwrite each other's checkpoints. The file is created only if it does not
exist (exclusively on disk, by a conditional put on S3). A lease expires if it is not renewed for `STALE_S`, or if its
holder is a dead process on this machine. Does not depend on what the run does.
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

from amd.storage import create, is_remote, read_bytes, remove, write_bytes

STALE_S = 90.0
RENEW_S = 15.0

logger = logging.getLogger(__name__)


class Lease:
    """A lease on a file: `acquire` takes it, and leaving the context releases it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        """Try to take the lease; return False if another process holds it."""
        holder = self.taken_by()
        if holder is not None:
            return False
        if not create(self.url, self._body()):
            if self.taken_by() is not None:
                return False
            write_bytes(self.url, self._body())  # its holder has died, or it is ours and the first response was lost
        time.sleep(0 if not is_remote(self.url) else 0.2)  # let a concurrent write finish; the last writer wins
        if self._read().get("token") != self._token:
            return False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return True

    def taken_by(self) -> dict[str, Any] | None:
        """Return the lease entry (host, pid, renewed, ray_submission) if its holder is still alive, else None."""
        holder = self._read()
        if not holder or holder.get("token") == self._token:
            return None
        if time.time() - holder["renewed"] > STALE_S:
            return None
        here = holder["host"] == socket.gethostname()
        return None if here and not _alive(holder["pid"], holder["born"]) else holder

    def holder(self) -> str:
        """Describe the holder for a message; it may have released the lease in the meantime."""
        found = self.taken_by() or {"host": "another machine", "pid": "?"}
        return f"process {found['pid']} on {found['host']}"

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            try:
                if self._read().get("token") == self._token:
                    remove(self.url)
            except Exception as error:  # it expires by itself
                logger.warning("the run's lease could not be released: %s", error)

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
            except Exception as error:  # a short storage outage; a long one fails the run itself
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
            "born": _start_time(pid),
            "renewed": time.time(),
            "ray_submission": _ray_submission(),
        }
        return json.dumps(value).encode()


def _ray_submission() -> str | None:
    """Return the ID of the `ray job submit` job that this process belongs to, or None."""
    try:
        metadata = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]
        return str(metadata["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return None


def _start_time(pid: int) -> str | None:
    """Return the start time of a process, which reveals a reused PID, or None if the time is unknown."""
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
    return _start_time(pid) == born
