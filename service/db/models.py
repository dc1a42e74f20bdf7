"""The tables. The database is the truth for what was asked and what was seen.

Knows no rules: those stand in the rooms' stores. Times are seconds since 1970, UTC; JSON columns hold plain values.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    type_annotation_map = {float: Double, dict[str, Any]: JSON, dict[str, str]: JSON, list[str]: JSON}  # noqa: RUF012


class Job(Base):
    """What was asked for, and where it stands."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_time", "created_at", "id"),
        Index("jobs_of_project", "project", "created_at", "id"),
        Index("jobs_by_state", "state", "created_at", "id"),
        Index("jobs_by_state_and_kind", "state", "kind", "created_at", "id"),
        Index("jobs_of_kind", "kind", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str | None] = mapped_column(String(200))
    labels: Mapped[dict[str, str]]
    priority: Mapped[int]
    origin: Mapped[str] = mapped_column(String(16))
    created_by: Mapped[str] = mapped_column(String(100))
    preset: Mapped[str | None] = mapped_column(String(100))
    config: Mapped[dict[str, Any]]
    """Resolved: complete, with the job's id as its name."""
    max_retries: Mapped[int]
    time_limit_s: Mapped[float | None]
    workers: Mapped[int]
    """The fewest that it runs with."""
    cpus: Mapped[float]
    """Of all those workers."""
    device: Mapped[str] = mapped_column(String(8))

    wanted: Mapped[str] = mapped_column(String(16))
    """What its owner wants of it: run, pause or cancel."""
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(40))
    message: Mapped[str] = mapped_column(Text)
    attempt: Mapped[int]
    """Attempts begun."""
    retries: Mapped[int]
    """Automatic ones since its owner last started it."""
    not_before: Mapped[float]
    """Queued, but not to start earlier."""
    stop_by: Mapped[float | None]
    """Asked to stop: until then it may save."""
    created_at: Mapped[float]
    changed_at: Mapped[float]
    started_at: Mapped[float | None]
    """When its newest attempt began."""
    ended_at: Mapped[float | None]
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    version: Mapped[int]
    """Counts changes; a change names the version it has seen."""


class Label(Base):
    """Labels once more, to find jobs by: with their time, so that a label's jobs are read in their order."""

    __tablename__ = "labels"
    __table_args__ = (Index("labels_by_value", "key", "value", "created_at", "job_id"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(63), primary_key=True)
    value: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[float]
    """The job's."""


class Attempt(Base):
    """One submission to Ray."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    submission_id: Mapped[str] = mapped_column(String(120))
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(40))
    message: Mapped[str] = mapped_column(Text)
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class JobEvent(Base):
    """Who did what to a job: written with each change, never altered. Its number is the job's version after it."""

    __tablename__ = "job_events"
    __table_args__ = (Index("job_events_by_time", "at", "job_id", "version"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    type: Mapped[str] = mapped_column(String(40))
    actor: Mapped[str] = mapped_column(String(100))
    data: Mapped[dict[str, Any]]


class Key(Base):
    """An API key: only its hash is kept."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    """Also the readable prefix of the key, by which it is found."""
    name: Mapped[str] = mapped_column(String(200))
    project: Mapped[str | None] = mapped_column(String(64))
    """None: all projects."""
    scopes: Mapped[list[str]]
    digest: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(String(100))
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    used_at: Mapped[float | None]


class Idempotency(Base):
    """Which job a request with an Idempotency-Key made."""

    __tablename__ = "idempotency"

    caller: Mapped[str] = mapped_column(String(100), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request: Mapped[str] = mapped_column(String(64))
    """sha256 of method, path and body."""
    job_id: Mapped[str] = mapped_column(String(100))
    """What it was answered with."""
    created_at: Mapped[float] = mapped_column(index=True)


class Hold(Base):
    """A lease: who does a task that only one replica may do."""

    __tablename__ = "holds"

    task: Mapped[str] = mapped_column(String(40), primary_key=True)
    holder: Mapped[str] = mapped_column(String(100))
    until: Mapped[float]


class Webhook(Base):
    """Who wants to hear of a project's job events."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    project: Mapped[str | None] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(String(128))
    """Signs the deliveries; kept readable, since HMAC needs it."""
    events: Mapped[list[str]]
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(String(100))


class Delivery(Base):
    """One event to one webhook, until it is taken or given up."""

    __tablename__ = "deliveries"
    __table_args__ = (
        UniqueConstraint("webhook_id", "job_id", "version"),
        Index("deliveries_due", "state", "not_before"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(String(100))
    version: Mapped[int]
    body: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    """waiting, taken or given_up."""
    tries: Mapped[int]
    """Begun."""
    not_before: Mapped[float]
    """Of the next one."""
    answer: Mapped[str] = mapped_column(Text)
    """What the last try came to."""
    created_at: Mapped[float]
    tried_at: Mapped[float | None]


class Encoder(Base):
    """A published encoder as it was last seen on the storage root, whose cards are the truth."""

    __tablename__ = "encoders"
    __table_args__ = (Index("encoders_by_time", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    """The name of its folder."""
    project: Mapped[str | None] = mapped_column(String(64))
    """Of the job that made it, or of who imported it. None: it came otherwise, and all projects may use it."""
    job_id: Mapped[str | None] = mapped_column(String(100))
    created_at: Mapped[float]
    card: Mapped[dict[str, Any]]
    stamp: Mapped[str] = mapped_column(String(64), default="")
    """What the storage told of the card's file when it was read; it tells something else once the file is another."""
    seen_at: Mapped[float]


class Alias(Base):
    """A name of a project for one of its encoders, which can be moved to another."""

    __tablename__ = "aliases"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    encoder_id: Mapped[str] = mapped_column(String(200))
    moves: Mapped[int]
    """Counts them; a move names the count it has seen."""
    changed_at: Mapped[float]
    changed_by: Mapped[str] = mapped_column(String(100))


class AliasMove(Base):
    """Where an alias has pointed: written with each move, never altered."""

    __tablename__ = "alias_moves"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    encoder_id: Mapped[str | None] = mapped_column(String(200))
    """None: the alias was taken away."""
    at: Mapped[float]
    actor: Mapped[str] = mapped_column(String(100))


class Deployment(Base):
    """Encoders that are to answer requests, and how."""

    __tablename__ = "deployments"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    encoder: Mapped[str] = mapped_column(String(200))
    """An id, or an alias of its project, which is followed."""
    candidate: Mapped[str | None] = mapped_column(String(200))
    """Answers a share of the requests."""
    share: Mapped[float]
    settings: Mapped[dict[str, Any]]
    serving: Mapped[dict[str, str]]
    """Of `encoder` and `candidate` the ids that the replicas were last told."""
    state: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    created_by: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[float]
    changed_at: Mapped[float]
    version: Mapped[int]
