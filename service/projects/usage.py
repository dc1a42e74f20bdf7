"""GPU- and CPU-hours used by jobs, computed from their attempts: reserved resources times running time.

An attempt that is still running counts up to the end of the period.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Engine, case, func, or_, select
from sqlalchemy.orm import Session

from service.db.models import Attempt, Job
from service.projects.schemas import UsageGroup

HOUR_S = 3600.0
REFRESH_S = 30.0  # usage changes slowly, and summing it reads every attempt in the period

_KEYS: dict[UsageGroup, Any] = {"project": Job.project, "user": Job.created_by, "job": Job.id, "sweep": Job.id}


class ResourceHours(NamedTuple):
    """Number of reserved CPU-hours and GPU-hours."""

    cpus: float = 0.0
    gpus: float = 0.0


class UsageRow(NamedTuple):
    """Usage of a project, user, job or sweep."""

    key: str
    project: str
    hours: ResourceHours
    jobs: int


class UsageStore:
    """Reads usage from the database."""

    def __init__(self, engine: Engine) -> None:
        self._reading = engine.execution_options(reads_only=True)

    def by_project(self, since: float, until: float, project: str | None = None) -> dict[str, ResourceHours]:
        """Return the usage between two times, by project. `project` limits it to one project."""
        return {row.key: row.hours for row in self.rows("project", since, until, project)}

    def rows(self, by: UsageGroup, since: float, until: float, project: str | None = None) -> Sequence[UsageRow]:
        """Return the usage between two times, most GPU-hours first. `project` limits it to one project.

        A user with jobs in several projects has one row per project.
        """
        end = case((or_(Attempt.ended_at.is_(None), Attempt.ended_at > until), until), else_=Attempt.ended_at)
        start = case((Attempt.started_at < since, since), else_=Attempt.started_at)
        hours = (end - start) / HOUR_S
        cpus, gpus = func.sum(hours * Attempt.cpus), func.sum(hours * Attempt.gpus)
        query = select(_KEYS[by], Job.project, cpus, gpus, func.count(Job.id.distinct()))
        query = query.join(Job, Job.id == Attempt.job_id).group_by(_KEYS[by], Job.project)
        overlaps = or_(Attempt.ended_at.is_(None), Attempt.ended_at > since)
        query = query.where(overlaps, Attempt.started_at < until)
        if by == "sweep":
            query = query.where(Job.kind == "search")
        if project is not None:
            query = query.where(Job.project == project)
        with Session(self._reading) as session:
            found = session.execute(query.order_by(gpus.desc(), cpus.desc(), _KEYS[by])).tuples()
            return [UsageRow(key, owner, ResourceHours(cpu, gpu), jobs) for key, owner, cpu, gpu, jobs in found]


class CachedUsage:
    """Caches the usage by project from the start of a period to now, for up to REFRESH_S seconds. Thread-safe."""

    def __init__(self, engine: Engine, since: Callable[[float], float]) -> None:
        """`since` returns the start of the period, given the current time."""
        self._usage, self._since, self._lock = UsageStore(engine), since, threading.Lock()
        self._found, self._read_at = dict[str, ResourceHours](), float("-inf")

    def by_project(self, now: float) -> Mapping[str, ResourceHours]:
        with self._lock:
            if not 0 <= now - self._read_at < REFRESH_S:
                self._found = self._usage.by_project(self._since(now), now)
                self._read_at = now
            return self._found


def hours_of(attempts: Iterable[Attempt], now: float) -> ResourceHours:
    """Return the total usage of attempts; running attempts count up to now."""
    cpus = gpus = 0.0
    for attempt in attempts:
        hours = max(0.0, (attempt.ended_at if attempt.ended_at is not None else now) - attempt.started_at) / HOUR_S
        cpus, gpus = cpus + hours * attempt.cpus, gpus + hours * attempt.gpus
    return ResourceHours(cpus, gpus)


def start_of_month(now: float) -> float:
    """Return the start of the calendar month (UTC) that contains a time."""
    at = datetime.fromtimestamp(now, UTC)
    return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
