"""A fake cluster, and helpers that queue jobs and report the status of their attempts."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from service.db.models import Job
from service.jobs.execution.protocol import AttemptOutcome, DriverPolicy, JobFolder
from service.jobs.execution.ray_jobs import Capacity, RayJobStatus
from service.jobs.execution.ray_nodes import Node
from service.jobs.store import JobStore, new_job_id
from service.web.errors import ClusterUnavailable


class FakeCluster:
    """A cluster that records calls, and whose job statuses are set by the test."""

    def __init__(self, cpus: float = 4.0, gpus: float = 0.0) -> None:
        self.total = Capacity(cpus, gpus, 1e9)
        self.jobs: dict[str, RayJobStatus] = {}
        self.submitted: list[str] = []
        self.policies: dict[str, DriverPolicy] = {}
        self.stopped: list[str] = []
        self.outputs: dict[str, str] = {}
        self.node_list: list[Node] = []
        self.unavailable = False

    def submit(
        self, submission_id: str, job_id: str, attempt: int, root: str, deadline_s: float, policy: DriverPolicy
    ) -> None:
        self._check_available()
        if submission_id not in self.jobs:
            self.submitted.append(submission_id)
            self.policies[submission_id] = policy
            self.jobs[submission_id] = RayJobStatus("RUNNING")

    def status(self, submission_id: str) -> RayJobStatus | None:
        self._check_available()
        return self.jobs.get(submission_id)

    def stop(self, submission_id: str) -> None:
        self._check_available()
        self.stopped.append(submission_id)

    def logs(self, submission_id: str) -> str | None:
        self._check_available()
        return self.outputs.get(submission_id)

    def capacity(self) -> Capacity:
        self._check_available()
        return self.total

    def nodes(self, submission_ids: Collection[str]) -> list[Node]:
        self._check_available()
        return self.node_list

    def _check_available(self) -> None:
        if self.unavailable:
            raise ClusterUnavailable("Ray at http://127.0.0.1:1 does not respond as expected: refused")


def queued(store: JobStore, **fields: Any) -> Job:
    """Add a queued job to the store."""
    return store.add(new_job(**fields), "test")


def new_job(**fields: Any) -> Job:
    """Return a queued job that is not stored."""
    now = time.time()
    values: dict[str, Any] = {
        "id": new_job_id("train"),
        "project": "default",
        "kind": "train",
        "labels": {},
        "priority": 0,
        "origin": "api",
        "created_by": "test",
        "config": {"checkpoint": {"deadline_s": 30.0}},
        "max_retries": 2,
        "workers": 1,
        "cpus": 1.0,
        "device": "cpu",
        "wanted": "run",
        "state": "queued",
        "message": "",
        "attempt": 0,
        "retries": 0,
        "not_before": now,
        "created_at": now,
        "changed_at": now,
    }
    return Job(**{**values, **fields})


def report_status(root: str, job: Job, state: Any = None, reason: str | None = None, **facts: Any) -> None:
    """Write a heartbeat for the newest attempt, or its outcome if `state` is set."""
    outcome = AttemptOutcome(state=state, reason=reason, ended=time.time(), **facts) if state else None
    JobFolder(root, job.id).write_heartbeat(job.attempt, {"step": 3, "steps": 10}, outcome)
