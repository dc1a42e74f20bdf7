"""Waiting jobs in queue order: highest priority first, then oldest. Read in pages, only as far as needed.

Admission usually closes after a few jobs, while the queue may contain any number. Jobs that cannot start before other
jobs end are left out of the following pages. Does not decide which job starts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, Engine, func, or_, select, tuple_
from sqlalchemy.orm import Session, defer

from service.db.models import Job
from service.jobs.schemas import WAITING

FIRST_PAGE, PAGE = 20, 200


class Exclusions(NamedTuple):
    """Criteria for jobs that cannot start now, regardless of the jobs ahead of them."""

    max_workers: Mapping[str, int] = {}
    """Maximum number of workers that a job may have to start now, by project; 0 if none of its jobs may start."""
    max_cpus: float | None = None
    """Total number of CPUs in the cluster; None if the cluster grows on demand."""
    max_gpus: float | None = None

    def conditions(self) -> Iterator[ColumnElement[bool]]:
        for project, workers in self.max_workers.items():
            yield or_(Job.project != project, Job.workers <= workers)
        if self.max_cpus is not None:
            yield Job.cpus <= self.max_cpus
        if self.max_gpus is not None:
            yield or_(Job.device != "cuda", Job.workers <= self.max_gpus)


class JobQueue:
    """Reads the queue from the database."""

    def __init__(self, engine: Engine) -> None:
        self._reading = engine.execution_options(reads_only=True)

    def waiting(self, now: float, excluded: Callable[[], Exclusions] = Exclusions) -> Iterator[Job]:
        """Yield the jobs that may start at time `now`, in queue order, without their configs.

        `excluded` is called before every page except the first, so that the first jobs always report why they are
        waiting.
        """
        states = (self._in_state(state, now, excluded) for state in sorted(WAITING))
        return heapq.merge(*states, key=lambda job: (-job.priority, job.created_at, job.id))

    def _in_state(self, state: str, now: float, excluded: Callable[[], Exclusions]) -> Iterator[Job]:
        priority, limit, exclusions = None, FIRST_PAGE, Exclusions()
        while (priority := self._next_priority(state, priority)) is not None:
            last: Job | None = None
            while True:
                where = [Job.state == state, Job.priority == priority, Job.not_before <= now, Job.origin == "api"]
                if last is not None:
                    where.append(tuple_(Job.created_at, Job.id) > tuple_(last.created_at, last.id))
                page = self._page([*where, *exclusions.conditions()], limit)
                yield from page
                read_all, limit, exclusions = len(page) < limit, PAGE, excluded()
                if read_all:
                    break
                last = page[-1]

    def _next_priority(self, state: str, below: int | None) -> int | None:
        query = select(func.max(Job.priority)).where(Job.state == state)
        if below is not None:
            query = query.where(Job.priority < below)
        with Session(self._reading) as session:
            return session.scalar(query)

    def _page(self, where: Sequence[ColumnElement[bool]], limit: int) -> list[Job]:
        query = select(Job).options(defer(Job.config, raiseload=True)).where(*where)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query.order_by(Job.created_at, Job.id).limit(limit)))
