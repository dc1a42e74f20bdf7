"""Admission: decide which queued jobs may start now, given the cluster's resources, quotas and configured limits.

`scheduling` offers jobs in order. The first job that fits the cluster but not its free resources gets a reservation;
jobs behind it start only if they do not delay it (`backfill`). Resources held by programs outside the queue
(`ray job submit`, notebooks) are not free. This module only makes the decision; it does not access the database or Ray.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from service.db.models import Job
from service.jobs.execution.backfill import ROUNDING, UNKNOWN, Holder, Reservation, Usage, expected_end, reserve
from service.jobs.execution.queue import Exclusions
from service.jobs.execution.ray_jobs import Capacity
from service.projects.accounts import ProjectAccounts
from service.projects.storage import GIB
from service.projects.usage import ResourceHours
from service.settings import Settings
from service.web.formats import plural

RELEASE_S = 15.0  # until Ray reports the resources of an ended job as free
START_S = 120.0  # until a started job holds its resources
HELD_HOURS = 1.0  # charged to a project for what it holds now, so that projects alternate before usage accrues


class ExternalUsage:
    """Estimates the resources held outside the queue: Ray's reported usage minus the service's own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ours: deque[tuple[float, Usage]] = deque()  # during the last RELEASE_S seconds
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


class Obstacle(NamedTuple):
    """Why a job must wait, and which jobs wait with it."""

    message: str
    closes: Literal["nothing", "project", "queue"] = "nothing"
    """Which jobs behind it must also wait: none, those of its project, or all."""


class AdmissionController:
    """Counts the resources used by active jobs, and admits further jobs within the limits."""

    def __init__(
        self,
        settings: Settings,
        capacity: Capacity,
        active: Iterable[Job],
        accounts: ProjectAccounts | None = None,
        now: float = 0.0,
    ) -> None:
        """`capacity`: the cluster's resources minus those that deployments reserve."""
        self._settings, self._capacity, self._now = settings, capacity, now
        self._accounts = accounts or ProjectAccounts()
        self._total, self._external, self._held = Usage(capacity.cpus, capacity.gpus), Usage(), Usage()
        self._active = list[Job]()
        self._jobs, self._workers = Counter[str](), Counter[str]()
        self._usage = dict[str, Usage]()  # of active jobs by project
        self._gpu_quota_reached = set[str]()  # projects whose next GPU job waits for the quota
        self.reserved_for: Job | None = None
        """First job that is waiting for resources to become free."""
        self._reservation = Reservation(UNKNOWN, self._total)
        for job in active:
            self.admit(job)

    @property
    def usage(self) -> Usage:
        """Resources reserved for active jobs."""
        return self._held

    def exclude(self, external: Usage) -> None:
        """Treat resources that are held outside the queue as unavailable."""
        self._external = external

    def needs(self, job: Job) -> Usage:
        """Return the resources that a job reserves on this cluster."""
        needs_gpus = job.device == "cuda" or (job.device == "auto" and self._capacity.gpus >= job.workers)
        return Usage(job.cpus, float(job.workers) if needs_gpus else 0.0)

    def admit(self, job: Job) -> None:
        """Count a job's resources as used."""
        needed = self.needs(job)
        self._active.append(job)
        self._jobs[job.project] += 1
        self._workers[job.project] += job.workers
        self._usage[job.project] = self._usage.get(job.project, Usage()).plus(needed)
        self._held = self._held.plus(needed)
        if self.reserved_for is not None:
            self._reservation = self._reservation.after(needed, expected_end(job, self._now))

    def used_share(self, project: str) -> float:
        """Return a project's recent cluster usage relative to its share. Projects with lower values start first."""
        recent = self._accounts.recent.get(project, ResourceHours())
        held = self._usage.get(project, Usage())
        used = (
            (hours + HELD_HOURS * now) / max(total, 1.0)
            for hours, now, total in zip(recent, held, self._total, strict=True)
        )
        return max(used) / self._accounts.policy(project).share

    def exclusions(self, project: str) -> Exclusions:
        """Return bounds on a project's jobs that can start in this step; the rest of its queue is read within them."""
        policy = self._accounts.policy(project)
        workers = _first(policy.max_workers, self._settings.project_max_workers)
        without_gpus = project in self._gpu_quota_reached or self._over_budget(project, "gpus") is not None
        if self._settings.autoscaling:
            return Exclusions(workers, max_gpus=0.0 if without_gpus else None)
        return Exclusions(workers, self._total.cpus, 0.0 if without_gpus else self._total.gpus)

    def obstacle(self, job: Job) -> Obstacle | None:
        """Return why a job must wait, or None if it may start."""
        if len(self._active) >= self._settings.max_running:
            message = f"waiting for one of {self._settings.max_running} running jobs to end"
            return Obstacle(message, closes="queue")
        needed = self.needs(job)
        return self._quota_obstacle(job, needed) or self._resource_obstacle(job, needed)

    def _quota_obstacle(self, job: Job, needed: Usage) -> Obstacle | None:
        project, policy = job.project, self._accounts.policy(job.project)
        max_jobs = _first(policy.max_running_jobs, self._settings.project_max_running)
        max_workers = _first(policy.max_workers, self._settings.project_max_workers)
        if max_jobs is not None and self._jobs[project] >= max_jobs:
            message = f"waiting for project {project} to drop below its limit of {max_jobs} running jobs"
            return Obstacle(message, closes="project")
        over = self._over_storage(project) or self._over_budget(project, "cpus")
        if over is not None:
            return Obstacle(over, closes="project")
        if max_workers is not None and self._workers[project] + job.workers > max_workers:
            message = (
                f"waiting for free workers: the job needs {job.workers}, "
                f"and project {project} is limited to {max_workers}"
            )
            # A job that exceeds the whole quota waits alone. Otherwise jobs behind it would overtake it indefinitely.
            return Obstacle(message, closes="nothing" if job.workers > max_workers else "project")
        return self._gpu_quota_obstacle(project, needed.gpus) if needed.gpus else None

    def _gpu_quota_obstacle(self, project: str, gpus: float) -> Obstacle | None:
        if (over := self._over_budget(project, "gpus")) is not None:
            return Obstacle(over)
        limit = self._accounts.policy(project).max_gpus
        if limit is None:
            return None
        deployed = self._accounts.deployed_gpus.get(project, 0.0)
        held = self._usage.get(project, Usage()).gpus + deployed
        if held + gpus > limit or project in self._gpu_quota_reached:
            if deployed + gpus <= limit:  # otherwise it exceeds the whole quota and waits alone
                self._gpu_quota_reached.add(project)
            return Obstacle(
                f"waiting for free GPUs: the job needs {gpus:g}, and project {project} is limited to {limit:g}, "
                f"of which its jobs and deployments hold {held:g}"
            )
        return None

    def _over_storage(self, project: str) -> str | None:
        limit, stored = self._accounts.policy(project).max_storage_gib, self._accounts.stored.get(project, 0) / GIB
        if limit is None or stored < limit:
            return None
        return (
            f"waiting for free storage: project {project} stores {stored:.1f} GiB and is limited to {limit:g}; "
            "delete jobs or encoders of the project"
        )

    def _over_budget(self, project: str, resource: Literal["cpus", "gpus"]) -> str | None:
        policy = self._accounts.policy(project)
        budget = policy.cpu_hours_per_month if resource == "cpus" else policy.gpu_hours_per_month
        used = getattr(self._accounts.month.get(project, ResourceHours()), resource)
        if budget is None or used < budget:
            return None
        kind = "CPU-hours" if resource == "cpus" else "GPU-hours"
        return f"waiting for the next month: project {project} has used {used:.1f} of its {budget:g} {kind}"

    def _resource_obstacle(self, job: Job, needed: Usage) -> Obstacle | None:
        if self._settings.autoscaling:
            return None
        if not needed.fits(self._total):
            return Obstacle(
                f"waiting for the cluster to grow: the job needs {_text(needed)}, "
                f"and the cluster has {_cpus_and_gpus(self._total)} in total"
            )
        if not needed.fits(self._free):
            if self.reserved_for is None:
                self.reserved_for = job
                self._reservation = reserve(needed, self._total, self._holders())
            held = self._external
            others = f"; programs outside the queue hold {_cpus_and_gpus(held)}" if any(held) else ""
            is_full = self._free.cpus <= ROUNDING
            return Obstacle(
                f"waiting for {_text(needed)} to become free{others}", closes="queue" if is_full else "nothing"
            )
        if self.reserved_for is not None and not self._reservation.allows(needed, expected_end(job, self._now)):
            return Obstacle(
                f"waiting behind a job that needs {_text(self.needs(self.reserved_for))}; "
                "a shorter time_limit_s may let this job start before it"
            )
        return None

    @property
    def _free(self) -> Usage:
        return self._total.minus(self._external).minus(self._held)

    def _holders(self) -> Iterable[Holder]:
        yield Holder(self._external, UNKNOWN)
        for job in self._active:
            yield Holder(self.needs(job), expected_end(job, self._now))

    def preemptible(self) -> list[Job]:
        """Return the running jobs of lower priority to stop for the job with the reservation.

        Those with the lowest priority come first, and newer ones before older ones.

        Empty if their resources would not suffice, or if jobs that are already stopping release enough.
        """
        if self.reserved_for is None:
            return []
        needed, free = self.needs(self.reserved_for), self._free
        for job in self._active:
            if job.state in ("pausing", "cancelling"):
                free = free.plus(self.needs(job))
        chosen = list[Job]()
        lower = (job for job in self._active if job.state == "running" and job.priority < self.reserved_for.priority)
        for job in sorted(lower, key=lambda job: (job.priority, -(job.started_at or 0.0))):
            if needed.fits(free):
                break
            missing = needed.minus(free)
            if any(held > 0 and lack > 0 for held, lack in zip(self.needs(job), missing, strict=True)):
                chosen.append(job)
                free = free.plus(self.needs(job))
        return chosen if needed.fits(free) else []


def _text(needed: Usage) -> str:
    """Format what a job needs; GPUs only if it needs any."""
    return _cpus_and_gpus(needed) if needed.gpus else plural(needed.cpus, "CPU")


def _cpus_and_gpus(amount: Usage) -> str:
    return f"{plural(amount.cpus, 'CPU')} and {plural(amount.gpus, 'GPU')}"


def _first(*limits: int | None) -> int | None:
    return next((limit for limit in limits if limit is not None), None)
