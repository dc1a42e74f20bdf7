"""Scheduling: decide which waiting jobs start in a step, in what order, and which running jobs they preempt.

Highest priority first; among jobs of equal priority, the project that has used the least of its share; within a
project, the oldest. A pure function of the queue and the state in `admission`: running jobs, capacity, quotas, usage
and time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from service.db.models import Job
from service.jobs.execution.admission import AdmissionController

MAX_WAITS = 60
"""Maximum number of a project's waiting jobs that a step examines but cannot start."""


class Schedule(NamedTuple):
    """Decisions of one step."""

    starts: list[Job]
    """Jobs to start, in order."""
    waits: list[tuple[Job, str]]
    """Jobs that were examined and must wait, with the reason."""
    preempted: list[Job]
    """Running jobs of lower priority to stop for the first blocked job."""
    reserved_for: str | None
    """ID of the first blocked job, for which resources are kept free."""


def schedule(
    queues: Mapping[str, Iterator[Job]],
    admission: AdmissionController,
    reserved_for: str | None = None,
    preemption: bool = False,
) -> Schedule:
    """Decide which waiting jobs start and which running jobs stop, given each project's queue in order.

    `reserved_for`: the job for which the previous step kept resources free. It stays first among jobs of its priority
    until it starts; otherwise a large job might never get its turn.
    """
    starts, waits = list[Job](), list[tuple[Job, str]]()
    heads = {project: job for project, queue in queues.items() if (job := next(queue, None)) is not None}
    waiting = Counter[str]()

    def order(project: str) -> tuple[float, bool, float, float, str]:
        job = heads[project]
        return -job.priority, job.id != reserved_for, admission.used_share(project), job.created_at, job.id

    while heads:
        project = min(heads, key=order)
        job = heads.pop(project)
        obstacle = admission.obstacle(job)
        if obstacle is None:
            admission.admit(job)
            starts.append(job)
        else:
            waits.append((job, obstacle.message))
            waiting[project] += 1
            if obstacle.closes == "queue":
                break
            if obstacle.closes == "project" or waiting[project] == MAX_WAITS:
                continue
        if (following := next(queues[project], None)) is not None:
            heads[project] = following
    blocked = admission.reserved_for
    preempted = admission.preemptible() if preemption else []
    return Schedule(starts, waits, preempted, blocked.id if blocked is not None else None)
