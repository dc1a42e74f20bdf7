"""Jobs in the database: every change is a compare-and-set on the job's version and is recorded as an event.

Changes made by users are also recorded in the audit log.

A deleted job keeps its row and its events, but appears only in its history and in listings that filter by its state.

State transitions are decided in `actions` and `execution.reconciler`. A listener delivers the events, so this module
does not depend on webhooks. Behaves identically on SQLite and PostgreSQL.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, CursorResult, Engine, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased, defer

from service.db.audit import record_change
from service.db.batches import in_batches
from service.db.models import Attempt, IdempotencyKey, Job, JobEvent, JobLabel
from service.jobs.schemas import DELETED
from service.web.errors import KeyInFlight, KeyReused, NotFound
from service.web.pagination import after, cursor_of

SERVICE = "service"  # actor of changes that no user requested
IDEMPOTENCY_S = 24 * 3600.0  # how long an Idempotency-Key is stored
EVENT_FIELDS = ("state", "reason", "message", "wanted", "attempt")  # changed fields that are recorded in the event

_WITHOUT_CONFIG = defer(Job.config, raiseload=True)  # kilobytes per job that a listing does not need

EventListener = Callable[[Session, Job, JobEvent], None]


class StaleJob(Exception):
    """Raised when the job has changed since it was read; the caller must read it again."""


class JobPageRows(NamedTuple):
    """One page of a listing."""

    jobs: list[Job]
    next_cursor: str | None


class JobFilter(NamedTuple):
    """Filter for a listing; an empty field matches every job."""

    project: str | None = None
    kinds: Collection[str] = ()
    states: Collection[str] = ()
    labels: Mapping[str, str] = {}
    origin: str | None = None
    text: str = ""
    """Text to search for in the ID, name and preset (case-insensitive)."""
    since: float | None = None
    until: float | None = None
    """Bounds on the creation time."""


class JobStore:
    """Jobs with their attempts, labels and events."""

    def __init__(self, engine: Engine, on_event: EventListener | None = None) -> None:
        """`on_event` is called for each event, within the transaction that writes it."""
        self.engine = engine
        self._on_event = on_event
        self._reading = engine.execution_options(reads_only=True)

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with Session(self._reading, expire_on_commit=False) as session:
            yield session

    # Submitting

    def add(self, job: Job, actor: str) -> Job:
        """Insert a new job with its first event and set `job.version` to 1."""
        with self._write() as session:
            self._add(session, job, actor)
        return job

    def add_once(self, job: Job, actor: str, key: str, request: bytes) -> tuple[Job, bool]:
        """Insert the job for a request with an Idempotency-Key, unless an earlier request with that key inserted it.

        Returns the job and whether it is new. Uses a single transaction, so that neither a crash nor a race inserts
        two jobs. Raises KeyReused if the key was already sent with a different request, or KeyInFlight if the first
        request has not completed.
        """
        digest = hashlib.sha256(request).hexdigest()
        try:
            with self._write() as session:
                session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < time.time() - IDEMPOTENCY_S))
                known = session.get(IdempotencyKey, (actor, key))
                if known is not None:
                    return self._known(session, known, digest, job.project), False
                row = {"caller": actor, "key": key, "request": digest, "job_id": job.id, "created_at": time.time()}
                session.execute(insert(IdempotencyKey).values(**row))
                self._add(session, job, actor)
                return job, True
        except IntegrityError:  # a concurrent request committed first
            with self._read() as session:
                known = session.get(IdempotencyKey, (actor, key))
                if known is None:
                    raise KeyInFlight(
                        "the first request with this Idempotency-Key has not completed yet; try again"
                    ) from None
                return self._known(session, known, digest, job.project), False

    def _known(self, session: Session, known: IdempotencyKey, digest: str, project: str) -> Job:
        if known.request != digest:
            raise KeyReused(f"Idempotency-Key {known.key!r} was already sent with a different request; use a new key")
        job = session.get(Job, known.job_id)
        # The project of an OIDC subject may have changed since.
        if job is None or job.state in DELETED or job.project != project:
            raise KeyReused(f"Idempotency-Key {known.key!r} belongs to a job that was deleted; use a new key")
        return job

    def _add(self, session: Session, job: Job, actor: str) -> None:
        job.version = 1
        session.add(job)
        session.flush()
        if job.labels:
            same = {"job_id": job.id, "created_at": job.created_at}
            session.execute(
                insert(JobLabel), [{"key": key, "value": value, **same} for key, value in job.labels.items()]
            )
        data = {"state": job.state, "kind": job.kind, "name": job.name}
        event = JobEvent(job_id=job.id, version=1, at=job.created_at, type="created", actor=actor, data=data)
        session.add(event)
        if actor != SERVICE:
            record_change(session, actor, "job.submit", job.id, job.project, job.state)
        self._notify(session, job, event)

    def _notify(self, session: Session, job: Job, event: JobEvent) -> None:
        if self._on_event is not None:
            self._on_event(session, job, event)

    # Reading

    def get(self, job_id: str, project: str | None = None, *, deleted: bool = False) -> Job:
        """Return a job. With `deleted`, include jobs whose deletion was requested, because their history is kept.

        Raises NotFound, including for a job in another project, whose existence is not disclosed.
        """
        with self._read() as session:
            job = session.get(Job, job_id)
        if job is None or project not in (None, job.project) or (job.state in DELETED and not deleted):
            raise NotFound(f"there is no job {job_id!r}")
        return job

    def list(self, where: JobFilter, cursor: str | None = None, limit: int = 50) -> JobPageRows:
        """List jobs, newest first, without their configs.

        Deleted jobs are included only if the filter selects their state. Raises BadCursor if the cursor is invalid.
        """
        query = select(Job).options(_WITHOUT_CONFIG).limit(limit + 1)
        at, job_id = Job.created_at, Job.id  # the columns that order the listing
        for key, value in where.labels.items():
            label = aliased(JobLabel)
            query = query.join(label, and_(label.job_id == Job.id, label.key == key, label.value == value))
            at, job_id = label.created_at, label.job_id
        query = query.order_by(at.desc(), job_id.desc()).where(*_conditions(where))
        if cursor:
            query = query.where(after(cursor, at, job_id))
        with self._read() as session:
            jobs = list(session.scalars(query))
        last = jobs[limit - 1] if len(jobs) > limit else None
        return JobPageRows(jobs[:limit], cursor_of(last.created_at, last.id) if last is not None else None)

    def in_states(self, states: Collection[str], origin: str = "api", limit: int | None = None) -> Sequence[Job]:
        """List the jobs in these states, without their configs: highest priority first, then oldest.

        Set `limit` for states that may contain many jobs. Waiting jobs are read by `execution.queue`.
        """
        query = select(Job).options(_WITHOUT_CONFIG).where(Job.state.in_(states), Job.origin == origin)
        with self._read() as session:
            return list(session.scalars(query.order_by(Job.priority.desc(), Job.created_at, Job.id).limit(limit)))

    def external(self, limit: int) -> Sequence[Job]:
        """List the newest external runs that have not succeeded."""
        query = select(Job).where(Job.origin == "external", Job.state != "succeeded")
        with self._read() as session:
            return list(session.scalars(query.order_by(Job.created_at.desc()).limit(limit)))

    def counts(self) -> dict[tuple[str, str], int]:
        """Return the number of jobs by (kind, state), excluding deleted jobs."""
        count = select(Job.kind, Job.state, func.count()).where(Job.state != "deleted")
        with self._read() as session:
            rows = session.execute(count.group_by(Job.kind, Job.state))
            return {(kind, state): count for kind, state, count in rows}

    def facets(self, where: JobFilter) -> dict[str, dict[str, int]]:
        """Return the number of matching jobs by state and by kind. Each count ignores the filter on its own field."""
        found = {}
        for name, column, others in (
            ("state", Job.state, where._replace(states=())),
            ("kind", Job.kind, where._replace(kinds=())),
        ):
            query = select(column, func.count()).where(*_conditions(others)).group_by(column)
            for key, value in where.labels.items():
                label = aliased(JobLabel)
                query = query.join(label, and_(label.job_id == Job.id, label.key == key, label.value == value))
            with self._read() as session:
                found[name] = dict(session.execute(query).tuples().all())
        return found

    def known(self, ids: Collection[str]) -> set[str]:
        """Return the subset of the IDs that belong to existing jobs."""
        with self._read() as session:
            batches = (session.scalars(select(Job.id).where(Job.id.in_(batch))) for batch in in_batches(ids))
            return {job_id for found in batches for job_id in found}

    def names(self, ids: Collection[str]) -> dict[str, str]:
        """Return the names of the jobs that have one, keyed by job ID. Includes deleted jobs."""
        with self._read() as session:
            named = select(Job.id, Job.name).where(Job.name.is_not(None))
            batches = (session.execute(named.where(Job.id.in_(batch))).tuples() for batch in in_batches(ids))
            return {job_id: str(name) for found in batches for job_id, name in found}

    def attempts(self, job_id: str) -> Sequence[Attempt]:
        with self._read() as session:
            return list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)))

    def newest_attempts(self, jobs: Collection[Job]) -> dict[str, Attempt]:
        """Return each job's newest attempt, keyed by job ID. Jobs that never started have no entry."""
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
        """Return (version, changed_at) by job ID. Event streams use them to detect changes."""
        with self._read() as session:
            found = dict[str, tuple[int, float]]()
            for batch in in_batches(ids):
                rows = session.execute(select(Job.id, Job.version, Job.changed_at).where(Job.id.in_(batch)))
                found |= {job_id: (version, changed) for job_id, version, changed in rows}
            return found

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
        """Set job fields and record an event. Returns the changed job.

        `attempt` sets fields of the newest attempt or, with `number`, of a new attempt.
        Raises StaleJob if the job has changed since it was read.
        """
        now = time.time()
        if number is not None:
            fields["attempt"] = number
        recorded = {key: value for key, value in fields.items() if key in EVENT_FIELDS}
        with self._write() as session:
            statement = (
                update(Job)
                .where(Job.id == job.id, Job.version == job.version)
                .values(version=job.version + 1, changed_at=now, **fields)
            )
            result = session.execute(statement)
            assert isinstance(result, CursorResult)
            if result.rowcount != 1:
                raise StaleJob(job.id)
            if attempt is not None:
                if number is not None:
                    session.add(Attempt(job_id=job.id, number=number, **attempt))
                else:
                    newest = (Attempt.job_id == job.id, Attempt.number == job.attempt)
                    session.execute(update(Attempt).where(*newest).values(**attempt))
            recorded |= data or {}
            row = JobEvent(job_id=job.id, version=job.version + 1, at=now, type=event, actor=actor, data=recorded)
            session.add(row)
            session.flush()
            changed = session.get(Job, job.id, populate_existing=True)
            assert changed is not None
            if actor != SERVICE:
                record_change(session, actor, f"job.{event}", job.id, job.project, changed.state)
            self._notify(session, changed, row)
            return changed

    def edit(self, job: Job, fields: Mapping[str, Any], actor: str) -> Job:
        """Set the fields that users may change: name, labels and priority. Raises StaleJob like `change`."""
        changed = self.change(job, "edit", actor=actor, data=fields, **fields)
        if "labels" in fields:
            same = {"job_id": job.id, "created_at": job.created_at}
            rows = [{"key": key, "value": value, **same} for key, value in changed.labels.items()]
            with self._write() as session:
                session.execute(delete(JobLabel).where(JobLabel.job_id == job.id))
                if rows:
                    session.execute(insert(JobLabel), rows)
        return changed

    def note_progress(self, job: Job, progress: Mapping[str, Any] | None, message: str | None = None) -> None:
        """Set progress and message without recording an event. No-op if the job has changed since it was read."""
        values: dict[str, Any] = {"progress": progress, "changed_at": time.time()}
        if message is not None:
            values["message"] = message
        with self._write() as session:
            session.execute(update(Job).where(Job.id == job.id, Job.version == job.version).values(**values))

    def finish_deletion(self, job: Job) -> None:
        """Record that a job's files have been removed, and delete its config and the outcomes of its attempts.

        Keeps the job and its events, which show who deleted it, and its attempts, which count towards usage. Raises
        StaleJob if another process has already recorded it.
        """
        with self._write() as session:
            session.execute(update(Attempt).where(Attempt.job_id == job.id).values(outcome=None, message=""))
        self.change(job, "deleted", state="deleted", message="", config={}, progress=None)


def _conditions(where: JobFilter) -> Iterator[ColumnElement[bool]]:
    """Yield the SQL conditions for a filter, except for its labels, which need joins."""
    if where.project is not None:
        yield Job.project == where.project
    if where.kinds:
        yield Job.kind.in_(where.kinds)
    yield Job.state.in_(where.states) if where.states else Job.state.not_in(DELETED)
    if where.origin:
        yield Job.origin == where.origin
    if where.text:
        columns = (Job.id, Job.name, Job.preset)
        yield or_(*(func.lower(column).contains(where.text.lower(), autoescape=True) for column in columns))
    if where.since is not None:
        yield Job.created_at >= where.since
    if where.until is not None:
        yield Job.created_at < where.until


def new_job_id(kind: str) -> str:
    """Create a readable ID that sorts by time. It is also the Ray submission ID and the name of the run."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
