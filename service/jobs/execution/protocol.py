"""Files through which a job and the control plane communicate, under `<root>/jobs/<job id>/`.

    config.json               the config that the driver verifies and passes to the job's program
    request.json              the job's kind, which selects the program, and the project that owns its files
    attempts/NNNN.json        the attempt's heartbeat: time, progress and, at the end, its outcome
    attempts/NNNN.stop.json   time that the attempt may take to stop, in seconds
    logs/NNNN/<offset>.log    the attempt's output, in immutable chunks named after their offsets
    output/                   files written by export, prepare and embed jobs

The storage root outlives clusters and control planes, so these files take precedence over what Ray reports.
Does not use HTTP or the database.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from amd.storage import STORAGE_CREDENTIALS, StorageUnreachable, filesystem, is_remote, join, write_json
from service.projects.schemas import StorageCredential

RETRYABLE = frozenset(
    {
        "storage_unreachable",
        "node_lost",
        "oom_host",
        "cluster_unavailable",
        "loader_crashed",
        "preempted_budget",
        "stalled",
    }
)
"""Machine, network and storage failures. Errors in the config, data or code would recur, so they are not retried."""


DRIVER_POLICY = "AMD_DRIVER_POLICY"
"""Environment variable of a driver that contains its DriverPolicy as JSON."""


class AttemptOutcome(BaseModel):
    """Outcome of an attempt."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None
    message: str = ""
    exit_code: int | None = None
    """Exit code of the program: negative if a signal terminated it, None if it was not reported."""
    asked_to_stop: bool = False
    """Whether the attempt received SIGTERM."""
    rank: int | None = None
    """Rank of the worker that failed first."""
    log_tail: str = ""
    result: dict[str, Any] | None = None
    """Last JSON line that the program printed: RunResult, SearchResult, EmbedResult or a probe's report."""
    ended: float = 0.0
    committed: dict[str, int] = {}
    """Work committed before a retryable failure: checkpoint steps by run, and the numbers of files and trials."""

    @property
    def retryable(self) -> bool:
        return self.state == "failed" and self.reason in RETRYABLE


class DriverPolicy(BaseModel):
    """Rules that a driver checks before it opens any location in a job's config.

    The control plane passes the policy with the submission, not through the storage root, which others can write to.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    digest: str
    """Digest of the submitted kind and config; see `request_digest`."""
    allowed_uris: tuple[str, ...]
    """URI prefixes from which the job may read, in addition to the storage root."""
    credentials: dict[str, StorageCredential] = {}
    """Storage credentials of the job's project by name. All processes of the job use them."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the submission. They contain no secrets, because Ray publishes them."""
        variables = {DRIVER_POLICY: self.model_dump_json(exclude={"credentials"})}
        if self.credentials:
            references = {name: credential.model_dump() for name, credential in self.credentials.items()}
            variables[STORAGE_CREDENTIALS] = json.dumps(references)
        return variables


def request_digest(kind: str, config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a job's kind and config."""
    return hashlib.sha256(json.dumps([kind, config], sort_keys=True).encode()).hexdigest()


class Heartbeat(BaseModel):
    """Latest status report from an attempt."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    at: float
    """Time of the heartbeat, on the node's clock."""
    host: str = ""
    progress: dict[str, Any] | None = None
    outcome: AttemptOutcome | None = None


class JobFolder(NamedTuple):
    """A job's folder under the storage root."""

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
        """Folder for the job's output files, which are deleted together with the job."""
        return join(self.url, "output")

    def heartbeat_file(self, attempt: int) -> str:
        return join(self.url, "attempts", f"{attempt:04d}.json")

    def write_stop_deadline(self, attempt: int, seconds: float) -> None:
        """Set the time that an attempt may take to stop before its program is killed."""
        write_json(self._stop_file(attempt), {"seconds": seconds})

    def read_stop_deadline(self, attempt: int) -> float | None:
        """Return the time that the attempt may take to stop, or None if it is not set.

        Raises StorageUnreachable without retrying.
        """
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
        """Return the newest heartbeat, or None if there is none yet.

        Raises StorageUnreachable without retrying, because callers poll.
        """
        found = _cat(self.heartbeat_file(attempt))
        try:
            return None if found is None else Heartbeat.model_validate_json(found)
        except ValidationError:
            return None

    @property
    def interval_s(self) -> float:
        """Seconds between heartbeats and between log chunks; longer on object stores, which charge for each write."""
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
