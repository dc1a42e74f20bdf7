"""Encoders and their aliases in the database: who may see which, what an alias points to, what an encoder is used by.

The cards on the storage root are the truth of what is published; `discovery` keeps the rows beside them. Knows nothing
of HTTP nor of files. Works alike on SQLite and PostgreSQL.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from sqlalchemy import ColumnElement, Engine, and_, delete, func, or_, select, true
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from amd.artifacts.discovery import encoder_folder
from service.db.models import Alias, AliasMove, Deployment, Encoder, Job, JobEvent
from service.jobs.kinds import places
from service.jobs.schemas import DEFAULT_PROJECT, ENDED
from service.web.errors import AliasMoved, EncoderInUse, Forbidden, IllegalAction, NotFound
from service.web.pagination import after, cursor_of

IMPORTED = "imported"  # of an encoder that no run of ours has trained


class EncoderFilter(NamedTuple):
    """What a listing shows; none: all."""

    project: str | None = None
    objective: str | None = None
    size: str | None = None
    alias: str | None = None
    job: str | None = None


class Page(NamedTuple):
    encoders: list[Encoder]
    next_cursor: str | None


class Owner(NamedTuple):
    job_id: str
    project: str


class EncoderStore:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with Session(self._reading, expire_on_commit=False) as session:
            yield session

    # Encoders

    def resolve(self, name: str, project: str | None = None) -> Encoder:
        """The encoder of that alias or id; `project`: none for all encoders, and the aliases of `default`.

        An alias outranks an encoder that came later under its name. Raises NotFound, also for what another project has.
        """
        with self._read() as session:
            return _resolve(session, name, project)

    def get(self, encoder_id: str, project: str | None = None) -> Encoder:
        """Raises NotFound."""
        with self._read() as session:
            return _get(session, encoder_id, project)

    def list(self, where: EncoderFilter, cursor: str | None = None, limit: int = 50) -> Page:
        """Newest first. Raises BadCursor."""
        query = select(Encoder).order_by(Encoder.created_at.desc(), Encoder.id.desc()).limit(limit + 1)
        query = query.where(_visible(where.project))
        if where.objective is not None:
            objective = Encoder.card["objective"].as_string()
            query = query.where(objective.is_(None) if where.objective == IMPORTED else objective == where.objective)
        if where.size is not None:
            query = query.where(Encoder.card[("encoder", "size")].as_string() == where.size)
        if where.job is not None:
            query = query.where(Encoder.job_id == where.job)
        if where.alias is not None:
            pointed = select(Alias.encoder_id).where(Alias.name == where.alias)
            if where.project is not None:
                pointed = pointed.where(Alias.project == where.project)
            query = query.where(Encoder.id.in_(pointed))
        if cursor:
            query = query.where(after(cursor, Encoder.created_at, Encoder.id))
        with self._read() as session:
            found = list(session.scalars(query))
        last = found[limit - 1] if len(found) > limit else None
        return Page(found[:limit], cursor_of(last.created_at, last.id) if last is not None else None)

    def forget(self, encoder_id: str, project: str | None, root: str) -> None:
        """Take an encoder out, unless something uses it; its folder below `root` is the caller's to remove.

        Raises NotFound, Forbidden for an encoder that belongs to all, EncoderInUse.
        """
        with self._write() as session:
            found = session.get(Encoder, encoder_id, with_for_update=True)  # an alias that is just moved here waits
            if found is None or not _sees(project, found):
                raise _unknown(encoder_id)
            if found.project is None and project is not None:
                raise Forbidden(f"{encoder_id} belongs to no project; whoever may act for all of them deletes it")
            uses = list(_uses(session, encoder_id, encoder_folder(root, encoder_id), project))
            if uses:
                message = f"{encoder_id} is used by {', '.join(uses)}; end that first"
                raise EncoderInUse(message, used_by=uses)
            session.delete(found)

    # Aliases

    def move(self, project: str, name: str, encoder: str, actor: str, expected: Collection[str | None] = ()) -> Alias:
        """Point an alias to an encoder, given by id or another alias.

        Nothing happens where it points there already. `expected`: what it may point to now, None being nothing yet; not
        given: anything. Raises NotFound, AliasMoved for an unexpected encoder, IllegalAction for the id of an encoder.
        """
        while True:
            try:
                with self._write() as session:
                    return self._move(session, project, name, encoder, actor, expected)
            except IntegrityError:  # another has just made it
                continue

    def _move(
        self, session: Session, project: str, name: str, encoder: str, actor: str, expected: Collection[str | None]
    ) -> Alias:
        target = _resolve(session, encoder, project)
        # Held until the move is done: a deletion waits, and one that was first is seen here.
        if session.get(Encoder, target.id, with_for_update={"read": True}, populate_existing=True) is None:
            raise _unknown(encoder)
        alias = session.get(Alias, (project, name), with_for_update=True)
        current = alias.encoder_id if alias is not None else None
        if alias is not None and current == target.id:
            return alias
        if expected and current not in expected:
            at = "points to nothing yet" if current is None else f"points to {current}"
            raise AliasMoved(f"{name} {at}, which was not expected; look again", current=current)
        named_so = session.get(Encoder, name)
        if alias is None and named_so is not None and _sees(project, named_so):
            raise IllegalAction(f"{name} is the id of an encoder; an alias needs another name", allowed_actions=[])
        now = time.time()
        number = 1 + (session.scalar(select(func.max(AliasMove.number)).where(*_moves_of(project, name))) or 0)
        if alias is None:
            alias = Alias(project=project, name=name)
            session.add(alias)
        alias.encoder_id, alias.moves, alias.changed_at, alias.changed_by = target.id, number, now, actor
        session.flush()  # the alias first: of two that make it at once one fails here
        session.add(AliasMove(project=project, name=name, number=number, encoder_id=target.id, at=now, actor=actor))
        return alias

    def drop(self, project: str, name: str, actor: str) -> None:
        """Take an alias away; where it pointed stays in its history. Raises NotFound."""
        with self._write() as session:
            alias = session.get(Alias, (project, name), with_for_update=True)
            if alias is None:
                raise _unknown_alias(name)
            number, at = alias.moves + 1, time.time()
            session.add(AliasMove(project=project, name=name, number=number, encoder_id=None, at=at, actor=actor))
            session.delete(alias)

    def alias(self, project: str, name: str) -> tuple[Alias, Sequence[AliasMove]]:
        """With its moves, oldest first. Raises NotFound."""
        with self._read() as session:
            alias = session.get(Alias, (project, name))
            if alias is None:
                raise _unknown_alias(name)
            moves = select(AliasMove).where(*_moves_of(project, name)).order_by(AliasMove.number)
            return alias, list(session.scalars(moves))

    def aliases(self, project: str | None) -> Sequence[Alias]:
        """Of a project, none: of all; by name."""
        query = select(Alias).order_by(Alias.name, Alias.project)
        if project is not None:
            query = query.where(Alias.project == project)
        with self._read() as session:
            return list(session.scalars(query))

    def aliases_of(self, ids: Collection[str], project: str | None) -> Sequence[Alias]:
        """Those that point to one of these encoders."""
        query = select(Alias).where(Alias.encoder_id.in_(ids)).order_by(Alias.name, Alias.project)
        if project is not None:
            query = query.where(Alias.project == project)
        with self._read() as session:
            return list(session.scalars(query))

    # What is on the storage root

    def stamps(self) -> dict[str, str]:
        """Of every card as it was read, by encoder."""
        with self._read() as session:
            return dict(session.execute(select(Encoder.id, Encoder.stamp)).tuples().all())

    def put(self, encoder: Encoder) -> None:
        """A new encoder, or the new card of one that is known, whose owner stays."""
        with suppress(IntegrityError), self._write() as session:  # another who looks was first
            known = session.get(Encoder, encoder.id, with_for_update=True)
            if known is None:
                session.add(encoder)
                return
            for field in ("created_at", "card", "stamp", "seen_at"):
                setattr(known, field, getattr(encoder, field))

    def vanished(self, ids: Collection[str]) -> None:
        """Encoders that are no longer on the storage root. Their aliases stay, and point to nothing."""
        with self._write() as session:
            session.execute(delete(Encoder).where(Encoder.id.in_(ids)))

    def owner(self, encoder_id: str, jobs: Collection[str]) -> Owner | None:
        """The job that published an encoder: one that imports it under this id, else one of `jobs`."""
        importing = and_(
            Job.kind == "import",
            Job.config["id"].as_string() == encoder_id,
            Job.state.not_in(("failed", "cancelled")),
        )
        query = select(Job.id, Job.project).order_by(importing.desc(), Job.created_at.desc()).limit(1)
        query = query.where(Job.origin == "api", or_(importing, Job.id.in_(jobs)))
        with self._read() as session:
            found = session.execute(query).first()
        return Owner(*found) if found is not None else None

    def has_news(self, since: float) -> bool:
        """Whether a job has succeeded since then: it may have published something."""
        query = select(JobEvent.at).where(JobEvent.at >= since, JobEvent.type == "succeeded").limit(1)
        with self._read() as session:
            return session.execute(query).first() is not None


def _visible(project: str | None) -> ColumnElement[bool]:
    return true() if project is None else or_(Encoder.project == project, Encoder.project.is_(None))


def _sees(project: str | None, encoder: Encoder) -> bool:
    return project is None or encoder.project in (None, project)


def _get(session: Session, encoder_id: str, project: str | None) -> Encoder:
    found = session.get(Encoder, encoder_id)
    if found is None or not _sees(project, found):
        raise _unknown(encoder_id)
    return found


def _resolve(session: Session, name: str, project: str | None) -> Encoder:
    alias = session.get(Alias, (project or DEFAULT_PROJECT, name))
    return _get(session, alias.encoder_id if alias is not None else name, project)


def _moves_of(project: str, name: str) -> tuple[ColumnElement[bool], ...]:
    return AliasMove.project == project, AliasMove.name == name


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no encoder {name!r}")


def _unknown_alias(name: str) -> NotFound:
    return NotFound(f"there is no alias {name!r}")


def _uses(session: Session, encoder_id: str, url: str, project: str | None) -> Iterator[str]:
    """What stands in the way of a deletion, in words; of another project without its name."""

    def told(kind: str, name: str, owner: str) -> str:
        return f"{kind} {name}" if project in (None, owner) else f"{kind} of another project"

    for alias in session.scalars(select(Alias).where(Alias.encoder_id == encoder_id).order_by(Alias.name)):
        yield told("alias", alias.name, alias.project)
    for deployment in session.scalars(select(Deployment).order_by(Deployment.name)):
        if encoder_id in (deployment.encoder, deployment.candidate, *deployment.serving.values()):
            yield told("deployment", deployment.name, deployment.project)
    live = select(Job.id, Job.project, Job.config).where(Job.state.not_in(ENDED), Job.origin == "api").order_by(Job.id)
    for job_id, owner, config in session.execute(live):
        if any(value.rstrip("/") in (encoder_id, url) for _, value in places(config)):
            yield told("job", job_id, owner)
