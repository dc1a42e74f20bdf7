"""Find a waiting job's position in its project's queue, and the job directly ahead of it. Reads few rows.

Which project is next depends on priorities and on what each project uses when resources become free, so a position
among all projects is not known in advance.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session, defer

from service.db.models import Job
from service.jobs.schemas import WAITING
from service.jobs.store import JobStore


class QueuePlace(NamedTuple):
    """Position of a waiting job in the queue of its project: by priority, then by age."""

    place: int
    """Position, starting at 1."""
    length: int
    """Number of waiting jobs in the project."""
    ahead: Job | None
    """Job directly ahead, without its config; None for the first job."""


def queue_place(jobs: JobStore, job: Job) -> QueuePlace | None:
    """Return a job's position in the queue of its project, or None if it is not waiting."""
    if job.state not in WAITING:
        return None
    waiting = (Job.state.in_(WAITING), Job.origin == "api", Job.project == job.project)
    older = or_(Job.created_at < job.created_at, and_(Job.created_at == job.created_at, Job.id < job.id))
    before = or_(Job.priority > job.priority, and_(Job.priority == job.priority, older))
    nearest = select(Job).options(defer(Job.config, raiseload=True)).where(*waiting, before)
    nearest = nearest.order_by(Job.priority, Job.created_at.desc(), Job.id.desc()).limit(1)
    count = select(func.count()).select_from(Job).where(*waiting)
    with Session(jobs.engine.execution_options(reads_only=True), expire_on_commit=False) as session:
        length, ahead = session.scalar(count) or 0, session.scalar(nearest)
        place = 1 + (session.scalar(count.where(before)) or 0)
    return QueuePlace(place, length, ahead)
