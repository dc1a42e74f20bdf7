"""Sources of a job's log: chunks under the storage root, or Ray for a run that `ray job submit` started.

Offsets are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool

from amd.storage import join, listdir
from amd.training.reporting.log_chunks import rank_log_folder
from amd.training.run_folder import run_folder
from service.db.models import Job
from service.jobs import logs
from service.jobs.execution.protocol import JobFolder
from service.jobs.execution.ray_jobs import Cluster
from service.jobs.logs import LogSlice
from service.web.bounded_calls import BoundedCalls
from service.web.errors import NotFound


class LogSource(Protocol):
    """A log that can be read from an offset."""

    def read(self, offset: int, whole_lines: bool) -> LogSlice:
        """Return a slice that starts at the offset, empty if there is nothing yet."""

    def pieces(self, offset: int) -> Iterable[str]:
        """Return the text from the offset to the end in chunks."""

    def tail_offset(self, lines: int) -> int:
        """Return the offset at which the last `lines` lines start."""

    def read_raw(self, offset: int) -> bytes:
        """Return some bytes starting at the offset; empty if nothing is stored there yet."""

    def size(self) -> int:
        """Return the current size of the log in bytes."""


class StoredLog:
    """A log in a folder under the storage root."""

    def __init__(self, folder: str) -> None:
        self._folder, self._reader = folder, logs.LogReader(folder)

    def read(self, offset: int, whole_lines: bool) -> LogSlice:
        return self._reader.read(offset, whole_lines=whole_lines)

    def pieces(self, offset: int) -> Iterable[str]:
        return logs.pieces(self._folder, offset)

    def tail_offset(self, lines: int) -> int:
        return logs.tail_offset(self._folder, lines)

    def read_raw(self, offset: int) -> bytes:
        return logs.read_raw(self._folder, offset)

    def size(self) -> int:
        return logs.size(self._folder)


def rank_log(run: str, rank: int, follow: bool) -> str:
    """Return the folder of a rank's log. Raises NotFound if there is none, unless `follow` is set."""
    folder = rank_log_folder(run, rank)
    if not follow and not listdir(folder):
        found = ", ".join(map(str, ranks_with_log(run))) or "none"
        raise NotFound(f"rank={rank}: has no log; ranks with a log: {found}")
    return folder


def ranks_with_log(run: str) -> list[int]:
    """Return the ranks of a run that have a log."""
    return [int(name.removeprefix("rank-")) for name in listdir(join(run, "logs")) if name.startswith("rank-")]


class RayLog:
    """Output of a submission's driver, which Ray keeps for as long as the node that ran the driver is alive.

    All methods raise NotFound if Ray does not have the output, or ClusterUnavailable if Ray does not respond.
    """

    def __init__(self, cluster: Cluster, job: Job, submission: str | None) -> None:
        """Check that the log exists. `submission` is None for a run that was started without `ray job submit`."""
        self._cluster, self._submission = cluster, submission
        self._remedy = f"the output of its workers is kept: amd jobs logs {job.id} --rank 0 (rank=0 in the REST API)"
        if submission is None:
            raise NotFound(f"{job.id} was started outside the service, so its log was not collected; {self._remedy}")
        self._content()

    def read(self, offset: int, whole_lines: bool) -> LogSlice:
        return logs.cut(bytearray(self._content()[offset:]), offset, whole_lines)

    def pieces(self, offset: int) -> Iterable[str]:
        return [self.read(offset, whole_lines=False).text]

    def tail_offset(self, lines: int) -> int:
        every_line = self._content().splitlines(keepends=True)
        return sum(map(len, every_line[: max(0, len(every_line) - lines)]))

    def read_raw(self, offset: int) -> bytes:
        return self._content()[offset:]

    def size(self) -> int:
        return len(self._content())

    def _content(self) -> bytes:
        content = self._cluster.logs(self._submission) if self._submission is not None else None
        if content is None:
            raise NotFound(f"Ray has no log for submission {self._submission!r}; {self._remedy}")
        return content.encode()


async def open_log(
    state: Any, job: Job, attempt: int | None, rank: int | None, *, wait: bool = False
) -> tuple[BoundedCalls, LogSource]:
    """Return the log of a rank or an attempt, and the thread pool for reading it. `state`: the application's state.

    Default: the log of the newest attempt.

    Raises NotFound if there is no such attempt or, unless `wait` is set, no such rank.
    """
    number = attempt or max(job.attempt, 1)
    if number > max(job.attempt, 1):
        raise NotFound(f"attempt={number}: does not exist; attempts of {job.id} so far: {job.attempt}")
    if rank is not None:
        folder = await state.storage_calls.run(rank_log, run_folder(state.settings.root, job.id), rank, wait)
        return state.storage_calls, StoredLog(folder)
    if job.origin == "external":
        submissions = {each.number: each.submission_id for each in await run_in_threadpool(state.jobs.attempts, job.id)}
        return state.ray_calls, await state.ray_calls.run(RayLog, state.cluster, job, submissions.get(number))
    return state.storage_calls, StoredLog(JobFolder(state.settings.root, job.id).logs(number))
