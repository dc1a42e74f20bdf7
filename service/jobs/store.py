"""Jobs in the database: every change is compare-and-set on the job's version, and leaves an event beside it.

Knows what may follow what only as far as `version` goes; the rules stand in `lifecycle`. Works alike on SQLite and
PostgreSQL.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import CursorResult, Engine, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased, defer

from service.db.models import Attempt, Hold, Idempotency, Job, JobEvent, Label
from service.web.errors import KeyInFlight, KeyReused, NotFound
from service.web.pagination import after, cursor_of
from service.webhooks.store import deliveries_for

SERVICE = "service"  # the actor of what nobody asked for by hand
REMEMBERED_S = 24 * 3600.0  # an Idempotency-Key
TOLD = ("state", "reason", "message", "wanted", "attempt")  # of a change, in its event

_WITHOUT_CONFIG = defer(Job.config, raiseload=True)  # kilobytes of each job, which a list has no use for


class Stale(Exception):
    """Somebody else changed the job first; look again."""


class Page(NamedTuple):
    jobs: list[Job]
    next_cursor: str | None


class JobFilter(NamedTuple):
    """What a listing shows; none: all."""

    project: str | None = None
    kinds: Collection[str] = ()
    states: Collection[str] = ()
    labels: Mapping[str, str] = {}
    origin: str | None = None


class JobStore:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._reading = engine.execution_options(reads_only=True)

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with Session(self._reading, expire_on_commit=False) as session:
            yield session

    # Asking

    def add(self, job: Job, actor: str) -> Job:
        """A new job with its first event. `job.version` is 1 afterwards."""
        with self._write() as session:
            self._add(session, job, actor)
        return job

    def add_once(self, job: Job, actor: str, key: str, request: bytes) -> tuple[Job, bool]:
        """The same for a request with an Idempotency-Key: the job of its first time, and whether this is it.

        One transaction, so that neither a crash nor a race makes two. Raises KeyReused where the key came with another
        request before.
        """
        digest = hashlib.sha256(request).hexdigest()
        try:
            with self._write() as session:
                session.execute(delete(Idempotency).where(Idempotency.created_at < time.time() - REMEMBERED_S))
                known = session.get(Idempotency, (actor, key))
                if known is not None:
                    return self._known(session, known, digest, key), False
                row = {"caller": actor, "key": key, "request": digest, "job_id": job.id, "created_at": time.time()}
                session.execute(insert(Idempotency).values(**row))
                self._add(session, job, actor)
                return job, True
        except IntegrityError:  # a request beside this one was first; it has committed
            with self._read() as session:
                known = session.get(Idempotency, (actor, key))
                if known is None:
                    raise KeyInFlight("the first request with this Idempotency-Key has not ended yet") from None
                return self._known(session, known, digest, key), False

    def _known(self, session: Session, known: Idempotency, digest: str, key: str) -> Job:
        if known.request != digest:
            raise KeyReused(f"Idempotency-Key {key!r} came with another request before; take a new key")
        job = session.get(Job, known.job_id)
        if job is None:
            raise KeyReused(f"Idempotency-Key {key!r} belongs to a job that was deleted; take a new key")
        return job

    def _add(self, session: Session, job: Job, actor: str) -> None:
        job.version = 1
        session.add(job)
        session.flush()
        if job.labels:
            same = {"job_id": job.id, "created_at": job.created_at}
            session.execute(insert(Label), [{"key": key, "value": value, **same} for key, value in job.labels.items()])
        data = {"state": job.state, "kind": job.kind, "name": job.name}
        event = JobEvent(job_id=job.id, version=1, at=job.created_at, type="created", actor=actor, data=data)
        session.add(event)
        deliveries_for(session, job, event)

    # Reading

    def get(self, job_id: str, project: str | None = None) -> Job:
        """Raises NotFound, also for a job of another project: its existence is nobody else's business."""
        with self._read() as session:
            job = session.get(Job, job_id)
        if job is None or (project is not None and job.project != project):
            raise NotFound(f"there is no job {job_id!r}")
        return job

    def list(self, where: JobFilter, cursor: str | None = None, limit: int = 50) -> Page:
        """Newest first, without their configs. Raises BadCursor."""
        query = select(Job).options(_WITHOUT_CONFIG).limit(limit + 1)
        at, job_id = Job.created_at, Job.id  # the columns that order it
        for key, value in where.labels.items():
            label = aliased(Label)
            query = query.join(label, and_(label.job_id == Job.id, label.key == key, label.value == value))
            at, job_id = label.created_at, label.job_id
        query = query.order_by(at.desc(), job_id.desc())
        if where.project is not None:
            query = query.where(Job.project == where.project)
        if where.kinds:
            query = query.where(Job.kind.in_(where.kinds))
        if where.states:
            query = query.where(Job.state.in_(where.states))
        if where.origin:
            query = query.where(Job.origin == where.origin)
        if cursor:
            query = query.where(after(cursor, at, job_id))
        with self._read() as session:
            jobs = list(session.scalars(query))
        last = jobs[limit - 1] if len(jobs) > limit else None
        return Page(jobs[:limit], cursor_of(last.created_at, last.id) if last is not None else None)

    def in_states(self, states: Collection[str]) -> Sequence[Job]:
        """All jobs in those states, without their configs: highest priority first, then oldest."""
        query = select(Job).options(_WITHOUT_CONFIG).where(Job.state.in_(states), Job.origin == "api")
        with self._read() as session:
            return list(session.scalars(query.order_by(Job.priority.desc(), Job.created_at, Job.id)))

    def external(self, limit: int) -> Sequence[Job]:
        """The newest runs from outside that have not succeeded."""
        query = select(Job).where(Job.origin == "external", Job.state != "succeeded")
        with self._read() as session:
            return list(session.scalars(query.order_by(Job.created_at.desc()).limit(limit)))

    def counts(self) -> dict[tuple[str, str], int]:
        """(kind, state) -> jobs."""
        with self._read() as session:
            rows = session.execute(select(Job.kind, Job.state, func.count()).group_by(Job.kind, Job.state))
            return {(kind, state): count for kind, state, count in rows}

    def known(self, ids: Collection[str]) -> set[str]:
        with self._read() as session:
            return set(session.scalars(select(Job.id).where(Job.id.in_(ids))))

    def attempts(self, job_id: str) -> Sequence[Attempt]:
        with self._read() as session:
            return list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)))

    def newest_attempts(self, jobs: Collection[Job]) -> dict[str, Attempt]:
        """By job; none for those that never started."""
        if not jobs:
            return {}
        query = select(Attempt).join(Job, and_(Job.id == Attempt.job_id, Job.attempt == Attempt.number))
        with self._read() as session:
            found = session.scalars(query.where(Job.id.in_([job.id for job in jobs])))
            return {attempt.job_id: attempt for attempt in found}

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.version > after)
        with self._read() as session:
            return list(session.scalars(query.order_by(JobEvent.version).limit(limit)))

    def versions(self, ids: Collection[str]) -> dict[str, tuple[int, float]]:
        """(version, changed_at) of many jobs at once: what event streams look at."""
        with self._read() as session:
            rows = session.execute(select(Job.id, Job.version, Job.changed_at).where(Job.id.in_(ids)))
            return {job_id: (version, changed) for job_id, version, changed in rows}

    # Changing

    def change(
        self,
        job: Job,
        event: str,
        *,
        actor: str = SERVICE,
        data: Mapping[str, Any] | None = None,
        attempt: Mapping[str, Any] | None = None,
        number: int | None = None,
        **fields: Any,
    ) -> Job:
        """Set fields if nobody else has changed the job since it was read; the job as it then is.

        `attempt`: fields of the newest attempt; with `number`, of a new one.
        Raises Stale.
        """
        now = time.time()
        if number is not None:
            fields["attempt"] = number
        told = {
            key: value for key, value in fields.items() if key in ("state", "reason", "message", "wanted", "attempt")
        }
        with self._write() as session:
            statement = (
                update(Job)
                .where(Job.id == job.id, Job.version == job.version)
                .values(version=job.version + 1, changed_at=now, **fields)
            )
            result = session.execute(statement)
            assert isinstance(result, CursorResult)
            if result.rowcount != 1:
                raise Stale(job.id)
            if attempt is not None:
                if number is not None:
                    session.add(Attempt(job_id=job.id, number=number, **attempt))
                else:
                    newest = (Attempt.job_id == job.id, Attempt.number == job.attempt)
                    session.execute(update(Attempt).where(*newest).values(**attempt))
            row_data = {**told, **(data or {})}
            happened = JobEvent(job_id=job.id, version=job.version + 1, at=now, type=event, actor=actor, data=row_data)
            session.add(happened)
            session.flush()
            changed = session.get(Job, job.id, populate_existing=True)
            assert changed is not None
            deliveries_for(session, changed, happened)
            return changed

    def note_progress(self, job: Job, progress: Mapping[str, Any] | None, message: str | None = None) -> None:
        """What is seen on the way, without an event and without a new version; nothing of a job that has moved on."""
        values: dict[str, Any] = {"progress": progress, "changed_at": time.time()}
        if message is not None:
            values["message"] = message
        with self._write() as session:
            session.execute(update(Job).where(Job.id == job.id, Job.version == job.version).values(**values))

    def delete(self, job: Job) -> None:
        """With its attempts and events. Raises Stale."""
        with self._write() as session:
            result = session.execute(delete(Job).where(Job.id == job.id, Job.version == job.version))
            assert isinstance(result, CursorResult)
            if result.rowcount != 1:
                raise Stale(job.id)

    # One of several

    def hold(self, task: str, holder: str, seconds: float) -> bool:
        """Take or renew the lease on a task for so long; whether it is now this holder's."""
        now = time.time()
        mine = {"holder": holder, "until": now + seconds}
        with self._write() as session:
            free = or_(Hold.holder == holder, Hold.until < now)
            result = session.execute(update(Hold).where(Hold.task == task, free).values(**mine))
            assert isinstance(result, CursorResult)
            if result.rowcount == 1:
                return True
        try:
            with self._write() as session:
                if session.get(Hold, task) is not None:
                    return False
                session.execute(insert(Hold).values(task=task, **mine))
            return True
        except IntegrityError:
            return False

    def let_go(self, task: str, holder: str) -> None:
        with self._write() as session:
            session.execute(delete(Hold).where(Hold.task == task, Hold.holder == holder))


def new_job_id(kind: str) -> str:
    """Readable, sortable by time, and also Ray's submission id and the run's id."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
