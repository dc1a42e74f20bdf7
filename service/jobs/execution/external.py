"""Discover runs under the storage root that were started outside the service, e.g. with `amd train`.

A run that `ray job submit` started can be cancelled, and its log can be read: its lease contains the submission ID,
which is recorded as an attempt. Other runs are listed read-only. Trials and teachers of a job belong to that job and
are not listed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import posixpath
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from amd.storage import join, listdir, read_json, read_many
from amd.training.lease import Lease
from amd.training.run_folder import CONFIG, FACTS, LEASE, RESULT, run_folder
from service.db.models import Attempt, Job
from service.jobs.execution.ray_jobs import Cluster
from service.jobs.kinds import KINDS
from service.jobs.schemas import ENDED
from service.jobs.store import JobStore, StaleJob
from service.web.schemas import DEFAULT_PROJECT, Project

logger = logging.getLogger(__name__)

SCAN_S = 30.0
READ_BATCH = 50  # runs that are read together
READ_BUDGET_S = 5.0  # time limit per scan for reading new runs, so that cancelled runs are stopped in time
STOP_AGAIN_S = 10.0
WATCHED = 100  # unfinished runs that each scan rereads, newest first, because they may have been resumed
KILLED = (
    "Ray ended it before it had saved a final checkpoint; its newest checkpoint is kept. RAY_JOB_STOP_WAIT_TIME_S in "
    "the env_vars of its runtime environment sets how long Ray waits"
)


class ExternalRunDiscovery:
    """Maintains a job row for each run started outside the service. `scan` is cheap if there are no new runs."""

    def __init__(self, store: JobStore, cluster: Cluster, root: str, clock: Callable[[], float] = time.time) -> None:
        self._store, self._cluster, self._root, self._clock = store, cluster, root, clock
        self._stopped_at: dict[str, float] = {}
        self._ignored: set[str] = set()  # names of runs that are already listed, belong to jobs, or cannot be read
        self._unread: list[str] = []  # names of runs that were listed and have not been read yet
        self._scanned_at = float("-inf")

    def scan(self) -> None:
        """Add new runs, and update unfinished ones every SCAN_S seconds. Raises StorageError.

        Reads new runs for about READ_BUDGET_S; the next scan continues.
        """
        now = self._clock()
        is_due = abs(now - self._scanned_at) >= SCAN_S
        if is_due:
            self._scanned_at = now
            if not self._unread:
                self._unread = [name for name in listdir(join(self._root, "runs")) if name not in self._ignored]
        began = self._clock()
        while self._unread:
            batch, self._unread = self._unread[:READ_BATCH], self._unread[READ_BATCH:]
            self._read(batch)
            if self._clock() - began > READ_BUDGET_S:
                break
        if is_due:
            for job in self._store.external(WATCHED):
                self._refresh(job)

    def _read(self, names: Sequence[str]) -> None:
        """Add the runs that were started outside the service and are not listed yet."""
        known = self._store.known(names)
        self._ignored.update(known)
        urls = {join(run_folder(self._root, name), FACTS): name for name in names if name not in known}
        for url, content in read_many(list(urls)).items():  # a folder without this file is being created
            self._add_if_readable(urls[url], content)

    def _add_if_readable(self, name: str, facts: bytes) -> None:
        try:
            if not self._add(name, json.loads(facts)):
                self._ignored.add(name)
        except FileNotFoundError:
            pass  # the folder is being created, or was removed
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("runs/%s cannot be read and is not listed: %s", name, error)
            self._ignored.add(name)

    def _add(self, name: str, facts: Any) -> bool:
        if facts.get("job") or facts["kind"] not in KINDS:
            return False
        folder = run_folder(self._root, name)
        config = read_json(join(folder, CONFIG))
        created = datetime.fromisoformat(facts["created"]).timestamp()
        user = (facts.get("host") or {}).get("user") or "unknown"
        workers = (config.get("scaling") or {}).get("workers") or [1]
        job = Job(
            id=name,
            project=_project(facts),
            kind=facts["kind"],
            labels={},
            priority=0,
            origin="external",
            created_by=user,
            config=config,
            max_retries=0,
            workers=workers[0],
            cpus=0.0,
            device="auto",
            wanted="run",
            attempt=0,
            retries=0,
            not_before=created,
            created_at=created,
            changed_at=created,
            started_at=created,
            **state_of(folder, self._clock()),
        )
        self._record_submission(self._store.add(job, user))
        return True

    def _refresh(self, job: Job) -> None:
        found = state_of(run_folder(self._root, job.id), self._clock())
        with contextlib.suppress(StaleJob):
            if found["state"] == "running":
                if job.state in ENDED:
                    job = self._store.change(job, "running", wanted="run", **found)
                self._record_submission(job)
                return
            if job.state == "cancelling" and found["reason"] == "unknown":
                found |= {"state": "cancelled", "reason": "deadline_exceeded", "message": KILLED}
            if any(getattr(job, name) != value for name, value in found.items() if name != "ended_at"):
                ending = {name: found[name] for name in ("state", "reason", "message", "ended_at")}
                self._store.change(job, found["state"], attempt=ending if job.attempt else None, **found)

    def _record_submission(self, job: Job) -> None:
        """Add an attempt if the run was started by a submission that is not recorded yet. Raises StaleJob."""
        holder = Lease(join(run_folder(self._root, job.id), LEASE)).taken_by() or {}
        newest = self._newest(job)
        submission = holder.get("ray_submission")
        if newest is not None and submission == newest.submission_id:
            return
        if submission is None or self._is_ours(submission):
            if job.state == "cancelling":  # someone resumed it in another way before Ray stopped the submission
                message = f"cannot be cancelled here: now run by process {holder.get('pid')} on {holder.get('host')}"
                self._store.change(job, "running", state="running", wanted="run", message=message)
            return
        attempt = {"submission_id": submission, "started_at": self._clock(), "ended_at": None, "state": "running"}
        attempt |= {"reason": None, "message": "", "outcome": None}
        self._store.change(job, "running", attempt=attempt, number=job.attempt + 1, state="running")

    def _is_ours(self, submission: str) -> bool:
        """Whether a submission belongs to one of our jobs, which nobody may stop by writing to the storage root."""
        return bool(self._store.known({submission, submission.rpartition("-")[0]}))

    def _newest(self, job: Job) -> Attempt | None:
        return self._store.newest_attempts([job]).get(job.id)

    def stop_cancelled(self) -> None:
        """Ask Ray to stop runs whose cancellation was requested, repeating the request every STOP_AGAIN_S seconds.

        Raises ClusterUnavailable.
        """
        cancelled = self._store.in_states(("cancelling",), origin="external")
        submissions = self._store.newest_attempts(cancelled)
        for job in cancelled:
            if self._clock() - self._stopped_at.get(job.id, float("-inf")) >= STOP_AGAIN_S:
                self._cluster.stop(submissions[job.id].submission_id)
                self._stopped_at[job.id] = self._clock()
                self._scanned_at = float("-inf")  # its result is expected soon


def _project(facts: dict[str, Any]) -> str:
    """Return the project that a run was started for, or the default project if AMD_PROJECT is not a valid name."""
    try:
        return TypeAdapter(Project).validate_python(facts.get("project"))
    except ValidationError:
        return DEFAULT_PROJECT


def state_of(folder: str, now: float) -> dict[str, Any]:
    """Derive a job's fields from its run folder."""
    if RESULT in listdir(folder):
        result = read_json(join(folder, RESULT))
        ending = {"state": result["state"], "reason": result.get("reason"), "message": result.get("message") or ""}
        return {**ending, "result": result, "ended_at": now}
    if Lease(join(folder, LEASE)).taken_by() is not None:
        return {"state": "running", "reason": None, "message": "", "result": None, "ended_at": None}
    name = posixpath.basename(folder)
    message = f"exited without reporting a result; run the same command again to resume {name}"
    return {"state": "failed", "reason": "unknown", "message": message, "result": None, "ended_at": now}
