"""Admission: decide which queued jobs may start now, given the cluster's resources and the configured limits.

Jobs are offered in queue order (`queue.JobQueue`): highest priority first, then oldest. A job that fits the cluster but
not its free resources closes admission, so that smaller jobs behind it cannot overtake it indefinitely. Resources held
by programs outside the queue (`ray job submit`, notebooks) do not count as free. This module only makes the decision;
it does not access the database or Ray.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from service.db.models import Job
from service.jobs.execution.queue import Exclusions
from service.jobs.execution.ray_jobs import Capacity
from service.settings import Settings

RELEASE_S = 15.0  # until Ray reports resources of an ended job as free
START_S = 120.0  # until a started job holds its resources


class Usage(NamedTuple):
    """Resources held on the cluster."""

    cpus: float = 0.0
    gpus: float = 0.0


class ExternalUsage:
    """Estimates the resources held outside the queue: Ray's reported usage minus the service's own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ours: deque[tuple[float, Usage]] = deque()  # of the last RELEASE_S seconds
        self._found = Usage()

    def update(self, capacity: Capacity, ours: Usage, active: Iterable[Job]) -> Usage:
        """Return the estimate. `ours`: resources reserved for active jobs and deployments.

        A starting job does not hold its reserved resources yet, so subtracting them would hide other programs' usage;
        the estimate therefore does not decrease while a job is starting.
        """
        now = self._clock()
        self._ours.append((now, ours))
        while self._ours[0][0] < now - RELEASE_S:
            self._ours.popleft()
        cpus, gpus = (max(usage[index] for _, usage in self._ours) for index in range(2))
        found = Usage(max(0.0, capacity.used_cpus - cpus), max(0.0, capacity.used_gpus - gpus))
        if any(job.progress is None and now - (job.started_at or now) < START_S for job in active):
            found = Usage(max(found.cpus, self._found.cpus), max(found.gpus, self._found.gpus))
        self._found = found
        return found


class AdmissionController:
    """Counts the resources used by active jobs, and admits further jobs within the limits."""

    def __init__(self, settings: Settings, capacity: Capacity, active: Iterable[Job]) -> None:
        self._settings, self._capacity = settings, capacity
        self._external = Usage()
        self._cpus = self._gpus = 0.0
        self._running = 0
        self._jobs: Counter[str] = Counter()
        self._workers: Counter[str] = Counter()
        self.is_closed = False
        """Whether no further job may start in this step."""
        for job in active:
            self.admit(job)

    @property
    def usage(self) -> Usage:
        """Resources reserved for active jobs."""
        return Usage(self._cpus, self._gpus)

    def exclude(self, external: Usage) -> None:
        """Treat resources that are held outside the queue as unavailable."""
        self._external = external

    def admit(self, job: Job) -> None:
        """Count a job's resources as used."""
        self._running += 1
        self._jobs[job.project] += 1
        self._workers[job.project] += job.workers
        self._cpus += job.cpus
        self._gpus += self._gpus_of(job)
        self.is_closed = self.is_closed or self._running >= self._settings.max_running

    @property
    def exclusions(self) -> Exclusions:
        """Jobs that cannot start in this step regardless of other admissions. Later pages of the queue omit them."""
        max_jobs, max_workers = self._settings.project_max_running, self._settings.project_max_workers
        limits = dict[str, int]()
        for project, jobs in self._jobs.items():
            if max_jobs is not None and jobs >= max_jobs:
                limits[project] = 0
            elif max_workers is not None:
                limits[project] = max_workers - self._workers[project]
        if self._settings.autoscaling:
            return Exclusions(limits)
        return Exclusions(limits, self._capacity.cpus, self._capacity.gpus)

    def obstacle(self, job: Job) -> str | None:
        """Return the reason why a job must wait, or None if it may start."""
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
        held = self._external
        if self._cpus + job.cpus + held.cpus > total.cpus or self._gpus + gpus + held.gpus > total.gpus:
            self.is_closed = True  # otherwise jobs behind this one would overtake it indefinitely
            others = f"; programs outside the queue hold {held.cpus:g} CPUs and {held.gpus:g} GPUs" if any(held) else ""
            return f"waiting for {request} to become free{others}"
        return None

    def _gpus_of(self, job: Job) -> float:
        needs_gpus = job.device == "cuda" or (job.device == "auto" and self._capacity.gpus >= job.workers)
        return float(job.workers) if needs_gpus else 0.0
