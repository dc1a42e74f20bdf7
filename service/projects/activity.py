"""The project event feed: job events, and users' changes to deployments, aliases and encoders, newest first.

Reads both tables through their time indexes. At equal times, changes come after job events.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from sqlalchemy import ColumnElement, Engine, and_, or_, select, tuple_
from sqlalchemy.orm import Session

from service.db.models import AuditEntry, Job, JobEvent
from service.projects.schemas import ActivityPage, ActivityView
from service.web.pagination import bad_cursor, cursor_of, position_of
from service.web.schemas import utc_datetime

JOB = "job"
CHANGES = ("alias.delete", "alias.move", "deployment.delete", "deployment.put", "encoder.delete")
"""Audit log actions that the feed includes. Actions on jobs are already job events."""

_JOB_POSITION = re.compile(r"job/([0-9]{1,15})/(.+)", re.DOTALL)
_CHANGE_POSITION = re.compile(r"change/([0-9a-f]{1,32})")

Position = tuple[float, bool, str, int]
"""Sort key of the feed, in descending order: time, whether it is a job event, ID, and version."""


class ActivityFilter(NamedTuple):
    """Filter for the feed; an empty field matches every event."""

    project: str | None = None
    types: Collection[str] = ()
    """Types such as `job.failed`, or kinds such as `job`."""
    since: float | None = None

    def selects(self, kind: str, type: str) -> bool:
        return not self.types or kind in self.types or type in self.types


class ActivityFeed:
    """Reads the feed from the database."""

    def __init__(self, engine: Engine) -> None:
        self._reading = engine.execution_options(reads_only=True)

    def page(self, where: ActivityFilter, cursor: str | None = None, limit: int = 50) -> ActivityPage:
        """Return a page of events. Raises BadCursor if the cursor is invalid."""
        after = _position(cursor) if cursor else None
        with Session(self._reading) as session:
            jobs = list(self._job_events(session, where, after, limit + 1))
            # Entries that are older than a full page of job events cannot be part of the page.
            oldest = jobs[-1][0][0] if len(jobs) > limit else None
            changes = list(self._changes(session, where, after, limit + 1, oldest))
        found = list(heapq.merge(jobs, changes, key=lambda item: item[0], reverse=True))
        next_cursor = _cursor(found[limit - 1][0]) if len(found) > limit else None
        return ActivityPage(items=[view for _, view in found[:limit]], next_cursor=next_cursor)

    def _job_events(
        self, session: Session, where: ActivityFilter, after: Position | None, limit: int
    ) -> Iterator[tuple[Position, ActivityView]]:
        types = [type.removeprefix(f"{JOB}.") for type in where.types if type.startswith(f"{JOB}.")]
        if not where.selects(JOB, "") and not types:
            return
        query = select(JobEvent, Job.project).join(Job, Job.id == JobEvent.job_id)
        order = (JobEvent.at.desc(), JobEvent.job_id.desc(), JobEvent.version.desc())
        query = query.order_by(*order).limit(limit)
        if types and JOB not in where.types:
            query = query.where(JobEvent.type.in_(types))
        if where.project is not None:
            query = query.where(Job.project == where.project)
        if where.since is not None:
            query = query.where(JobEvent.at >= where.since)
        if after is not None:
            at, is_job, job_id, version = after
            key = tuple_(JobEvent.job_id, JobEvent.version)
            same_time = and_(JobEvent.at == at, key < tuple_(job_id, version))
            query = query.where(or_(JobEvent.at < at, same_time) if is_job else JobEvent.at < at)
        for event, project in session.execute(query).tuples():
            yield (
                (event.at, True, event.job_id, event.version),
                ActivityView(
                    at=utc_datetime(event.at),
                    type=f"{JOB}.{event.type}",
                    target=event.job_id,
                    project=project,
                    version=event.version,
                    actor=event.actor,
                    data=event.data,
                ),
            )

    def _changes(
        self, session: Session, where: ActivityFilter, after: Position | None, limit: int, oldest: float | None
    ) -> Iterator[tuple[Position, ActivityView]]:
        actions = [action for action in CHANGES if where.selects(action.partition(".")[0], action)]
        if not actions:
            return
        query = select(AuditEntry).where(AuditEntry.action.in_(actions))
        query = query.order_by(AuditEntry.at.desc(), AuditEntry.id.desc()).limit(limit)
        if where.project is not None:
            query = query.where(AuditEntry.project == where.project)
        for bound in (where.since, oldest):
            if bound is not None:
                query = query.where(AuditEntry.at >= bound)
        if after is not None:
            query = query.where(_change_after(after))
        for entry in session.scalars(query):
            yield (
                (entry.at, False, entry.id, 0),
                ActivityView(
                    at=utc_datetime(entry.at),
                    type=entry.action,
                    target=entry.target,
                    project=entry.project,
                    version=None,
                    actor=entry.actor,
                    data={"outcome": entry.outcome},
                ),
            )


def _change_after(after: Position) -> ColumnElement[bool]:
    at, is_job, id, _ = after
    if is_job:
        return AuditEntry.at <= at
    return or_(AuditEntry.at < at, and_(AuditEntry.at == at, AuditEntry.id < id))


def _cursor(position: Position) -> str:
    at, is_job, id, version = position
    return cursor_of(at, f"job/{version}/{id}" if is_job else f"change/{id}")


def _position(cursor: str) -> Position:
    at, row = position_of(cursor)
    if found := _JOB_POSITION.fullmatch(row):
        return at, True, found[2], int(found[1])
    if found := _CHANGE_POSITION.fullmatch(row):
        return at, False, found[1], 0
    raise bad_cursor()
