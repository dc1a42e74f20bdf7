"""Encoders and aliases in the database: visibility, alias moves and encoder uses.

Cards under the storage root are authoritative; `discovery` keeps the rows in sync. Knows nothing about HTTP and reads
no files. Runs on SQLite and PostgreSQL.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from sqlalchemy import ColumnElement, Engine, Text, cast, delete, func, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from amd.artifacts.discovery import encoder_folder
from amd.storage import is_remote, local_path
from service.db.audit import record_change
from service.db.batches import in_batches
from service.db.models import Alias, AliasMove, Deletion, Deployment, Job, JobEvent, RegisteredEncoder
from service.jobs.kinds import uris_in
from service.jobs.schemas import ENDED, PUBLISHING
from service.web.errors import AliasMoved, EncoderInUse, IllegalAction, NotFound
from service.web.pagination import after, cursor_of
from service.web.schemas import DEFAULT_PROJECT

ENCODER = "encoder"  # kind of the deletions recorded here
IMPORTED = "imported"  # objective of encoders that this service did not train


class EncoderFilter(NamedTuple):
    """Filters for a listing; None matches every encoder."""

    project: str | None = None
    objective: str | None = None
    size: str | None = None
    alias: str | None = None
    job: str | None = None


class EncoderListing(NamedTuple):
    """A page of encoders and the cursor for the next page."""

    encoders: list[RegisteredEncoder]
    next_cursor: str | None


class EncoderNames(NamedTuple):
    """What users call some encoders, besides their IDs."""

    aliases: Sequence[Alias]
    of_jobs: dict[str, str]
    """Names of the jobs that have the ID of an encoder, by ID."""


class EncoderStore:
    """Encoders and aliases in the database."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._reading = engine.execution_options(reads_only=True)

    @contextmanager
    def _write_session(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _read_session(self) -> Iterator[Session]:
        with Session(self._reading, expire_on_commit=False) as session:
            yield session

    # Encoders

    def resolve(self, name: str, project: str | None = None) -> RegisteredEncoder:
        """Resolve an alias or encoder ID. `project=None` covers all encoders, and the aliases in `default`.

        An alias takes precedence over an encoder ID with the same name. Raises NotFound, including for encoders in
        another project.
        """
        with self._read_session() as session:
            return _resolve(session, name, project)

    def get(self, encoder_id: str, project: str | None = None) -> RegisteredEncoder:
        """Get an encoder by ID. Raises NotFound."""
        with self._read_session() as session:
            return _get(session, encoder_id, project)

    def list(self, where: EncoderFilter, cursor: str | None = None, limit: int = 50) -> EncoderListing:
        """Return a page of encoders, newest first. Raises BadCursor if the cursor is invalid."""
        query = select(RegisteredEncoder).where(_visible(where.project)).limit(limit + 1)
        query = query.order_by(RegisteredEncoder.created_at.desc(), RegisteredEncoder.id.desc())
        if where.objective is not None:
            objective = RegisteredEncoder.card["objective"].as_string()
            query = query.where(objective.is_(None) if where.objective == IMPORTED else objective == where.objective)
        if where.size is not None:
            query = query.where(RegisteredEncoder.card[("encoder", "size")].as_string() == where.size)
        if where.job is not None:
            query = query.where(RegisteredEncoder.job_id == where.job)
        if where.alias is not None:
            targets = select(Alias.encoder_id).where(Alias.name == where.alias)
            if where.project is not None:
                targets = targets.where(Alias.project == where.project)
            query = query.where(RegisteredEncoder.id.in_(targets))
        if cursor:
            query = query.where(after(cursor, RegisteredEncoder.created_at, RegisteredEncoder.id))
        with self._read_session() as session:
            found = list(session.scalars(query))
        last = found[limit - 1] if len(found) > limit else None
        return EncoderListing(found[:limit], cursor_of(last.created_at, last.id) if last is not None else None)

    def delete_encoder(self, encoder_id: str, project: str | None, root: str, actor: str) -> None:
        """Delete an unused encoder's row, and record the deletion. `discovery` then removes its folder under `root`.

        Raises NotFound or EncoderInUse.
        """
        with self._write_session() as session:
            found = session.get(RegisteredEncoder, encoder_id, with_for_update=True)  # blocks concurrent alias moves
            if found is None or not _can_see(project, found):
                raise _encoder_not_found(encoder_id)
            uses = list(_find_uses(session, encoder_id, encoder_folder(root, encoder_id), project))
            if uses:
                message = f"{encoder_id} is used by {', '.join(uses)}; remove those uses first"
                raise EncoderInUse(message, used_by=uses)
            session.delete(found)
            row = Deletion(kind=ENCODER, object_id=encoder_id, project=found.project, actor=actor, at=time.time())
            session.add(row)
            record_change(session, actor, "encoder.delete", encoder_id, found.project, "deleted")

    def pending_deletions(self) -> Sequence[str]:
        """Return the IDs of deleted encoders whose files may remain."""
        with self._read_session() as session:
            return list(session.scalars(select(Deletion.object_id).where(*_pending()).order_by(Deletion.id)))

    def finish_deletion(self, encoder_id: str) -> None:
        """Record that a deleted encoder's files have been removed. Its ID can then be used for a new encoder."""
        with self._write_session() as session:
            pending = (*_pending(), Deletion.object_id == encoder_id)
            session.execute(update(Deletion).where(*pending).values(done_at=time.time()))

    # Aliases

    def move_alias(
        self, project: str, name: str, encoder: str, actor: str, expected: Collection[str | None] = ()
    ) -> Alias:
        """Point an alias to an encoder, identified by ID or by another alias. No-op if it already points there.

        `expected` lists the encoders that the alias may currently point to, with None if the alias may be missing; if
        empty, there is no condition. Raises NotFound, AliasMoved if the condition fails, or IllegalAction if `name` is
        an encoder ID.
        """
        while True:
            try:
                with self._write_session() as session:
                    return self._move_alias(session, project, name, encoder, actor, expected)
            except IntegrityError:  # created concurrently
                continue

    def _move_alias(
        self, session: Session, project: str, name: str, encoder: str, actor: str, expected: Collection[str | None]
    ) -> Alias:
        target = _resolve(session, encoder, project)
        # Locked until commit: a concurrent deletion waits, and an earlier one is detected here.
        if session.get(RegisteredEncoder, target.id, with_for_update={"read": True}, populate_existing=True) is None:
            raise _encoder_not_found(encoder)
        alias = session.get(Alias, (project, name), with_for_update=True)
        current = alias.encoder_id if alias is not None else None
        if alias is not None and current == target.id:
            return alias
        if expected and current not in expected:
            state = "does not exist" if current is None else f"points to {current}"
            raise AliasMoved(
                f"alias {name} {state}, which does not match `expected`; get the alias and retry", current=current
            )
        encoder_of_that_name = session.get(RegisteredEncoder, name)
        if alias is None and encoder_of_that_name is not None and _can_see(project, encoder_of_that_name):
            raise IllegalAction(
                f"{name} is the ID of an encoder; choose a different name for the alias", allowed_actions=[]
            )
        now = time.time()
        number = 1 + (session.scalar(select(func.max(AliasMove.number)).where(*_moves_of(project, name))) or 0)
        if alias is None:
            alias = Alias(project=project, name=name)
            session.add(alias)
        alias.encoder_id, alias.moves, alias.changed_at, alias.changed_by = target.id, number, now, actor
        session.flush()  # insert the alias first, so that one of two concurrent creations fails here
        session.add(AliasMove(project=project, name=name, number=number, encoder_id=target.id, at=now, actor=actor))
        record_change(session, actor, "alias.move", name, project, target.id)
        return alias

    def delete_alias(self, project: str, name: str, actor: str) -> None:
        """Delete an alias but keep its history. Raises NotFound."""
        with self._write_session() as session:
            alias = session.get(Alias, (project, name), with_for_update=True)
            if alias is None:
                raise _alias_not_found(name)
            number, at = alias.moves + 1, time.time()
            session.add(AliasMove(project=project, name=name, number=number, encoder_id=None, at=at, actor=actor))
            session.delete(alias)
            record_change(session, actor, "alias.delete", name, project, "deleted")

    def alias(self, project: str, name: str) -> tuple[Alias, Sequence[AliasMove]]:
        """Return an alias and its moves, oldest first. Raises NotFound."""
        with self._read_session() as session:
            alias = session.get(Alias, (project, name))
            if alias is None:
                raise _alias_not_found(name)
            moves = select(AliasMove).where(*_moves_of(project, name)).order_by(AliasMove.number)
            return alias, list(session.scalars(moves))

    def aliases(self, project: str | None) -> Sequence[Alias]:
        """Return the aliases of a project, or of all projects, sorted by name."""
        query = select(Alias).order_by(Alias.name, Alias.project)
        if project is not None:
            query = query.where(Alias.project == project)
        with self._read_session() as session:
            return list(session.scalars(query))

    def names_of(self, encoders: Sequence[RegisteredEncoder], project: str | None) -> EncoderNames:
        """Return the aliases in a project, or in all, that point to these encoders, and the names of their jobs."""
        ids = {one.id for one in encoders}
        aliases = select(Alias).where(Alias.encoder_id.in_(ids))
        if project is not None:
            aliases = aliases.where(Alias.project == project)
        jobs = select(Job.id, Job.name).where(Job.id.in_(ids))
        with self._read_session() as session:
            return EncoderNames(
                list(session.scalars(aliases.order_by(Alias.name, Alias.project))),
                {id: name for id, name in session.execute(jobs).tuples() if name is not None},
            )

    # Index of the encoders under the storage root

    def stamps(self) -> dict[str, str]:
        """Return the stamp of each indexed card, by encoder ID."""
        with self._read_session() as session:
            return dict(session.execute(select(RegisteredEncoder.id, RegisteredEncoder.stamp)).tuples().all())

    def upsert(self, encoder: RegisteredEncoder) -> None:
        """Insert an encoder, or update its card.

        Also updates the owner if another job or run has republished the encoder. No-op while the encoder's files are
        being removed.
        """
        with suppress(IntegrityError), self._write_session() as session:  # inserted concurrently by another scan
            known = session.get(RegisteredEncoder, encoder.id, with_for_update=True)
            if known is None:
                pending = select(Deletion.id).where(*_pending(), Deletion.object_id == encoder.id).limit(1)
                if session.scalar(pending) is None:  # otherwise the card was read before its removal
                    session.add(encoder)
                return
            moved = any(known.card.get(origin) != encoder.card.get(origin) for origin in ("job", "run"))
            for field in ("created_at", "card", "stamp", "seen_at", *(("project", "job_id") if moved else ())):
                setattr(known, field, getattr(encoder, field))

    def remove_missing(self, ids: Collection[str]) -> None:
        """Delete these encoders, which are gone from the storage root. Their aliases are kept but no longer resolve."""
        with self._write_session() as session:
            for batch in in_batches(ids):
                session.execute(delete(RegisteredEncoder).where(RegisteredEncoder.id.in_(batch)))

    def job_succeeded_since(self, since: float) -> bool:
        """Return whether a job has succeeded since this time and may therefore have published an encoder."""
        query = select(JobEvent.at).where(JobEvent.at >= since, JobEvent.type == "succeeded").limit(1)
        with self._read_session() as session:
            return session.execute(query).first() is not None


def _pending() -> tuple[ColumnElement[bool], ...]:
    return Deletion.kind == ENCODER, Deletion.done_at.is_(None)


def _visible(project: str | None) -> ColumnElement[bool]:
    return true() if project is None else RegisteredEncoder.project == project


def _can_see(project: str | None, encoder: RegisteredEncoder) -> bool:
    return project in (None, encoder.project)


def _get(session: Session, encoder_id: str, project: str | None) -> RegisteredEncoder:
    found = session.get(RegisteredEncoder, encoder_id)
    if found is None or not _can_see(project, found):
        job = session.get(Job, encoder_id)
        raise _encoder_not_found(encoder_id, job if job is not None and project in (None, job.project) else None)
    return found


def _resolve(session: Session, name: str, project: str | None) -> RegisteredEncoder:
    alias = session.get(Alias, (project or DEFAULT_PROJECT, name))
    return _get(session, alias.encoder_id if alias is not None else name, project)


def _moves_of(project: str, name: str) -> tuple[ColumnElement[bool], ...]:
    return AliasMove.project == project, AliasMove.name == name


def _encoder_not_found(name: str, job: Job | None = None) -> NotFound:
    """`job`: visible job with the encoder's ID, if there is one."""
    message = f"there is no encoder {name!r}"
    if job is not None and job.kind in PUBLISHING and job.state != "succeeded":
        message += f": that job's state is {job.state}, and it publishes its encoder when it succeeds"
    return NotFound(message)


def _alias_not_found(name: str) -> NotFound:
    return NotFound(f"there is no alias {name!r}")


def _find_uses(session: Session, encoder_id: str, url: str, project: str | None) -> Iterator[str]:
    """Describe each use that prevents a deletion, omitting names from other projects."""

    def describe(kind: str, name: str, owner: str) -> str:
        return f"{kind} {name}" if project in (None, owner) else f"{kind} of another project"

    for alias in session.scalars(select(Alias).where(Alias.encoder_id == encoder_id).order_by(Alias.name)):
        yield describe("alias", alias.name, alias.project)
    for deployment in session.scalars(select(Deployment).order_by(Deployment.name)):
        if encoder_id in (deployment.encoder, deployment.candidate, *deployment.serving.values()):
            yield describe("deployment", deployment.name, deployment.project)
    live = (
        select(Job.id, Job.project, Job.kind, Job.config)
        .where(Job.state.not_in(ENDED), Job.origin == "api")
        .where(cast(Job.config, Text).contains(encoder_id, autoescape=True))  # IDs are stored unescaped
        .order_by(Job.id)
    )
    for job_id, owner, kind, config in session.execute(live):
        if any(value == encoder_id or _is_below(value, url) for _, value in uris_in(kind, config)):
            yield describe("job", job_id, owner)


def _is_below(value: str, url: str) -> bool:
    """Whether a location is the folder at `url`, or a file in it."""
    path = value.rstrip("/") if is_remote(value) else str(local_path(value))
    return f"{path}/".startswith(f"{url}/")
