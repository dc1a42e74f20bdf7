"""Files that connect a job and the control plane, below `<root>/jobs/<job id>/`. Independent of HTTP and database.

    config.json               the config that the job's program reads
    request.json              the job's kind, which selects the program
    attempts/NNNN.json        the attempt's heartbeat: time, progress, and at the end its outcome
    attempts/NNNN.stop.json   seconds the attempt may take to stop
    logs/NNNN/<offset>.log    its output, in immutable chunks named by their offset
    output/                   files made by an export, a preparation or an embedding

The storage root outlives clusters and control planes: what is stored there takes precedence over what Ray reports.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from amd.storage import StorageUnreachable, filesystem, is_remote, join, write_json

RETRYABLE = frozenset(
    {"storage_unreachable", "node_lost", "oom_host", "cluster_unavailable", "loader_crashed", "preempted_budget"}
)
"""Reasons caused by machines, network or storage. Errors in config, data or code would only recur."""


class AttemptOutcome(BaseModel):
    """How an attempt ended."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None
    message: str = ""
    exit_code: int | None = None
    """Negative: terminated by that signal. None: not reported."""
    asked_to_stop: bool = False
    """Whether it was sent SIGTERM."""
    rank: int | None = None
    """The worker that failed first."""
    log_tail: str = ""
    result: dict[str, Any] | None = None
    """The program's last JSON line: RunResult, SearchResult, EmbedResult or a probe's report."""
    ended: float = 0.0

    @property
    def retryable(self) -> bool:
        return self.state == "failed" and self.reason in RETRYABLE


class Heartbeat(BaseModel):
    """Latest status report of an attempt."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    at: float
    """Time on the node's clock."""
    host: str = ""
    progress: dict[str, Any] | None = None
    outcome: AttemptOutcome | None = None


class JobFolder(NamedTuple):
    """A job's folder on the storage root."""

    root: str
    job_id: str

    @property
    def url(self) -> str:
        return join(self.root, "jobs", self.job_id)

    @property
    def request(self) -> str:
        return join(self.url, "request.json")

    @property
    def config(self) -> str:
        return join(self.url, "config.json")

    @property
    def output(self) -> str:
        """Folder for a job whose result is files; deleted with the job."""
        return join(self.url, "output")

    def heartbeat_file(self, attempt: int) -> str:
        return join(self.url, "attempts", f"{attempt:04d}.json")

    def write_stop_deadline(self, attempt: int, seconds: float) -> None:
        """Set how long an attempt may take to stop before its program is killed."""
        write_json(self._stop_file(attempt), {"seconds": seconds})

    def read_stop_deadline(self, attempt: int) -> float | None:
        """None if no deadline was set. Raises StorageUnreachable without retrying, as `read_heartbeat` does."""
        found = _cat(self._stop_file(attempt))
        return None if found is None else float(json.loads(found)["seconds"])

    def _stop_file(self, attempt: int) -> str:
        return join(self.url, "attempts", f"{attempt:04d}.stop.json")

    def logs(self, attempt: int) -> str:
        return join(self.url, "logs", f"{attempt:04d}")

    def write_heartbeat(
        self, attempt: int, progress: dict[str, Any] | None, outcome: AttemptOutcome | None = None
    ) -> None:
        heartbeat = Heartbeat(at=time.time(), host=socket.gethostname(), progress=progress, outcome=outcome)
        write_json(self.heartbeat_file(attempt), heartbeat.model_dump(mode="json"))

    def read_heartbeat(self, attempt: int) -> Heartbeat | None:
        """None if the attempt has sent none yet. Raises StorageUnreachable without retrying: callers poll."""
        found = _cat(self.heartbeat_file(attempt))
        try:
            return None if found is None else Heartbeat.model_validate_json(found)
        except ValidationError:
            return None

    @property
    def interval_s(self) -> float:
        """Seconds between heartbeats and between log chunks: an object store bills each write."""
        return 5.0 if is_remote(self.root) else 1.0


def _cat(url: str) -> bytes | None:
    fs, path = filesystem(url)
    try:
        content: bytes = fs.cat_file(path)
        return content
    except FileNotFoundError:
        return None
    except Exception as error:  # every backend raises its own exceptions
        raise StorageUnreachable(f"{url}: {type(error).__name__}: {error}") from None
