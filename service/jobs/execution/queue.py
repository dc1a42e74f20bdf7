"""Each project's waiting jobs in order: highest priority first, then oldest. Read in pages, and only as far as needed.

Scheduling usually examines a few jobs, while the queue may contain any number. After the first page, jobs that cannot
start until others end are left out. Does not decide which job starts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Engine, func, or_, select, tuple_
from sqlalchemy.orm import Session, defer

from service.db.models import Job
from service.jobs.schemas import WAITING

FIRST_PAGE, PAGE = 20, 50


class Exclusions(NamedTuple):
    """Upper bounds on what a project's jobs may need to be able to start now. None: no bound."""

    max_workers: int | None = None
    max_cpus: float | None = None
    max_gpus: float | None = None

    def conditions(self) -> Iterator[ColumnElement[bool]]:
        if self.max_workers is not None:
            yield Job.workers <= self.max_workers
        if self.max_cpus is not None:
            yield Job.cpus <= self.max_cpus
        if self.max_gpus is not None:
            yield or_(Job.device != "cuda", Job.workers <= self.max_gpus)


class JobQueue:
    """Reads the queue from the database."""

    def __init__(self, engine: Engine) -> None:
        self._reading = engine.execution_options(reads_only=True)

    def projects(self) -> set[str]:
        """Return the projects with waiting jobs."""
        return {project for state in WAITING for project in self._in_turn(Job.project, Job.state == state)}

    def waiting(self, project: str, now: float, excluded: Callable[[], Exclusions] = Exclusions) -> Iterator[Job]:
        """Yield the jobs of a project that may start at time `now`, in queue order, without their configs.

        `excluded` is called before every page except the first, so that the first jobs always report why they are
        waiting.
        """
        states = (self._in_state(state, project, now, excluded) for state in sorted(WAITING))
        return heapq.merge(*states, key=lambda job: (-job.priority, job.created_at, job.id))

    def _in_state(self, state: str, project: str, now: float, excluded: Callable[[], Exclusions]) -> Iterator[Job]:
        limit, exclusions = FIRST_PAGE, Exclusions()
        for priority in self._in_turn(Job.priority, Job.state == state, Job.project == project, descending=True):
            last: Job | None = None
            while True:
                where = [Job.state == state, Job.project == project, Job.priority == priority]
                where += [Job.not_before <= now, Job.origin == "api"]
                if last is not None:
                    where.append(tuple_(Job.created_at, Job.id) > tuple_(last.created_at, last.id))
                page = self._page([*where, *exclusions.conditions()], limit)
                yield from page
                read_all, limit, exclusions = len(page) < limit, PAGE, excluded()
                if read_all:
                    break
                last = page[-1]

    def _in_turn(self, column: Any, *where: ColumnElement[bool], descending: bool = False) -> Iterator[Any]:
        """Yield the distinct values of an indexed column. Reads one row per value, however many jobs are waiting."""
        nearest, last = func.max(column) if descending else func.min(column), None
        while True:
            query = select(nearest).where(*where)
            if last is not None:
                query = query.where(column < last if descending else column > last)
            with Session(self._reading) as session:
                last = session.scalar(query)
            if last is None:
                return
            yield last

    def _page(self, where: Sequence[ColumnElement[bool]], limit: int) -> list[Job]:
        query = select(Job).options(defer(Job.config, raiseload=True)).where(*where)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query.order_by(Job.created_at, Job.id).limit(limit)))
