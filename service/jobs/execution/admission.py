"""Admission: decide which queued jobs may start now, given the cluster's resources and the configured limits.

Jobs are offered in queue order (`JobStore.in_states`): highest priority first, then oldest. A job that fits the
cluster but not its free resources closes admission, so that smaller jobs behind it cannot overtake it indefinitely.
This module only makes the decision; it does not access the database or Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from service.db.models import Job
from service.jobs.execution.ray_jobs import Capacity
from service.settings import Settings


class AdmissionController:
    """Counts the resources used by active jobs, and admits further jobs within the limits."""

    def __init__(self, settings: Settings, capacity: Capacity, active: Iterable[Job]) -> None:
        self._settings, self._capacity = settings, capacity
        self._cpus = self._gpus = 0.0
        self._running = 0
        self._jobs: Counter[str] = Counter()
        self._workers: Counter[str] = Counter()
        self.is_closed = False
        """Whether no further job may start in this step."""
        for job in active:
            self.admit(job)

    def admit(self, job: Job) -> None:
        """Count a job's resources as used."""
        self._running += 1
        self._jobs[job.project] += 1
        self._workers[job.project] += job.workers
        self._cpus += job.cpus
        self._gpus += self._gpus_of(job)
        self.is_closed = self.is_closed or self._running >= self._settings.max_running

    def obstacle(self, job: Job) -> str | None:
        """Return why a job must wait, or None if it may start."""
        max_jobs, max_workers = self._settings.project_max_running, self._settings.project_max_workers
        if self.is_closed:
            return f"waiting for one of {self._settings.max_running} running jobs to end"
        if max_jobs is not None and self._jobs[job.project] >= max_jobs:
            return f"waiting for project {job.project} to drop below its limit of {max_jobs} running jobs"
        if max_workers is not None and self._workers[job.project] + job.workers > max_workers:
            return (
                f"waiting for free workers: the job needs {job.workers}, "
                f"and project {job.project} is limited to {max_workers}"
            )
        if self._settings.autoscaling:
            return None
        total, gpus = self._capacity, self._gpus_of(job)
        request = f"{job.cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        if job.cpus > total.cpus or gpus > total.gpus:
            return (
                f"waiting for the cluster to grow: the job needs {request}, "
                f"and the cluster has {total.cpus:g} CPUs and {total.gpus:g} GPUs in total"
            )
        if self._cpus + job.cpus > total.cpus or self._gpus + gpus > total.gpus:
            self.is_closed = True  # otherwise jobs behind this one would overtake it indefinitely
            return f"waiting for {request} to become free"
        return None

    def _gpus_of(self, job: Job) -> float:
        needs_gpus = job.device == "cuda" or (job.device == "auto" and self._capacity.gpus >= job.workers)
        return float(job.workers) if needs_gpus else 0.0
