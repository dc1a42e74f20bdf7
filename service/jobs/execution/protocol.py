"""What passes between a job and the control plane: files below `<root>/jobs/<job id>/`. No HTTP, no database.

    config.json               what the job's program reads
    request.json              which program
    attempts/NNNN.json        the attempt's word: alive at, how far, and at the end what it came to
    attempts/NNNN.stop.json   how long it may take to stop
    logs/NNNN/<offset>.log    what it printed, in immutable chunks named by their first byte
    output/                   what an export, a preparation or an embedding made

The storage root outlives clusters and control planes: what stands there outranks what Ray believes.
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
"""Reasons that lie in machines, network or storage. What lies in config, data or code comes back."""


class Outcome(BaseModel):
    """How an attempt ended."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None
    message: str = ""
    exit_code: int | None = None
    """Negative: ended by that signal. None: it never said."""
    asked_to_stop: bool = False
    """It was sent SIGTERM."""
    rank: int | None = None
    """The worker that failed first."""
    log_tail: str = ""
    result: dict[str, Any] | None = None
    """What the program printed last: RunResult, SearchResult, EmbedResult or a probe's report."""
    ended: float = 0.0

    @property
    def retryable(self) -> bool:
        return self.state == "failed" and self.reason in RETRYABLE


class Word(BaseModel):
    """What an attempt last said of itself."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    at: float
    """By the clock of its node."""
    host: str = ""
    progress: dict[str, Any] | None = None
    outcome: Outcome | None = None


class JobFolder(NamedTuple):
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
        """What a job that only makes files writes into; it goes when the job is deleted."""
        return join(self.url, "output")

    def word(self, attempt: int) -> str:
        return join(self.url, "attempts", f"{attempt:04d}.json")

    def limit_stop(self, attempt: int, seconds: float) -> None:
        """How long an attempt that is about to be stopped may take; what then still runs is ended by force."""
        write_json(self._stop(attempt), {"seconds": seconds})

    def stop_limit(self, attempt: int) -> float | None:
        """None: nobody has said. Raises StorageUnreachable at once, as `hear`."""
        found = _cat(self._stop(attempt))
        return None if found is None else float(json.loads(found)["seconds"])

    def _stop(self, attempt: int) -> str:
        return join(self.url, "attempts", f"{attempt:04d}.stop.json")

    def logs(self, attempt: int) -> str:
        return join(self.url, "logs", f"{attempt:04d}")

    def say(self, attempt: int, progress: dict[str, Any] | None, outcome: Outcome | None = None) -> None:
        word = Word(at=time.time(), host=socket.gethostname(), progress=progress, outcome=outcome)
        write_json(self.word(attempt), word.model_dump(mode="json"))

    def hear(self, attempt: int) -> Word | None:
        """None where it has said nothing yet. Raises StorageUnreachable at once: whoever looks will look again."""
        found = _cat(self.word(attempt))
        try:
            return None if found is None else Word.model_validate_json(found)
        except ValidationError:
            return None

    @property
    def pause_s(self) -> float:
        """Between two words, and between two chunks of log: an object store bills each."""
        return 5.0 if is_remote(self.root) else 1.0


def _cat(url: str) -> bytes | None:
    fs, path = filesystem(url)
    try:
        content: bytes = fs.cat_file(path)
        return content
    except FileNotFoundError:
        return None
    except Exception as error:  # every backend raises its own kinds
        raise StorageUnreachable(f"{url}: {type(error).__name__}: {error}") from None
