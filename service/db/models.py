"""Database tables: desired and observed state of jobs, and records of keys, webhooks, encoders and deployments.

Contains no business rules; those are in each package's store. Times are in seconds since the Unix epoch. The tables of
deployments are defined in `deployment_models` and imported here, so that this module provides all tables.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base as Base
from service.db.deployment_models import Deployment as Deployment
from service.db.deployment_models import DeploymentRevision as DeploymentRevision


class Job(Base):
    """A job: its request, desired state and observed state."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_time", "created_at", "id"),
        Index("jobs_of_project", "project", "created_at", "id"),
        Index("jobs_by_state", "state", "created_at", "id"),
        Index("jobs_by_state_and_kind", "state", "kind", "created_at", "id"),
        Index("jobs_in_queue", "state", "priority", "created_at", "id"),
        Index("jobs_in_queue_of_project", "state", "project", "priority", "created_at", "id"),
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
    """Resolved config, with the job's ID as its name."""
    max_retries: Mapped[int]
    time_limit_s: Mapped[float | None]
    workers: Mapped[int]
    """Minimum number of workers."""
    cpus: Mapped[float]
    """Total number of CPUs for the minimum number of workers."""
    device: Mapped[str] = mapped_column(String(8))

    wanted: Mapped[str] = mapped_column(String(16))
    """Desired state: run, pause, cancel, delete, limit once the time limit has passed, or preempt to return to the
    queue."""
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(40))
    message: Mapped[str] = mapped_column(Text)
    attempt: Mapped[int]
    """Number of attempts started."""
    retries: Mapped[int]
    """Number of automatic retries since the owner last started the job or the job last committed work."""
    not_before: Mapped[float]
    """Earliest time at which a queued job may start."""
    stop_by: Mapped[float | None]
    """Deadline for the final checkpoint after a stop request."""
    created_at: Mapped[float]
    changed_at: Mapped[float]
    started_at: Mapped[float | None]
    """Start time of the newest attempt."""
    ended_at: Mapped[float | None]
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    version: Mapped[int]
    """Number of changes. A change applies only if the version has not changed since it was read."""


class JobLabel(Base):
    """A job label, indexed together with the job's creation time so that jobs can be listed by label in order."""

    __tablename__ = "labels"
    __table_args__ = (Index("labels_by_value", "key", "value", "created_at", "job_id"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(63), primary_key=True)
    value: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[float]
    """Creation time of the job."""


class Attempt(Base):
    """One attempt to run a job: a single submission to Ray."""

    __tablename__ = "attempts"
    __table_args__ = (Index("attempts_by_end", "ended_at"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    submission_id: Mapped[str] = mapped_column(String(120))
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(40))
    message: Mapped[str] = mapped_column(Text)
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    cpus: Mapped[float] = mapped_column(server_default="0", default=0.0)
    """CPUs reserved for the attempt."""
    gpus: Mapped[float] = mapped_column(server_default="0", default=0.0)
    """GPUs reserved for the attempt."""


class JobEvent(Base):
    """Record of a change to a job, written together with the change. Its number is the job's new version. Immutable."""

    __tablename__ = "job_events"
    __table_args__ = (Index("job_events_by_time", "at", "job_id", "version"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    type: Mapped[str] = mapped_column(String(40))
    actor: Mapped[str] = mapped_column(String(100))
    data: Mapped[dict[str, Any]]


class ApiKey(Base):
    """An API key; only a hash of its secret is stored."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    """ID of the key, which is also its readable prefix."""
    name: Mapped[str] = mapped_column(String(200))
    project: Mapped[str | None] = mapped_column(String(64))
    """Project that the key is limited to, or None for all projects."""
    scopes: Mapped[list[str]]
    digest: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(String(100))
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    used_at: Mapped[float | None]


class BrowserSession(Base):
    """A console session of an API key or an OIDC user, or a single-use link that opens one for an API key."""

    __tablename__ = "browser_sessions"
    __table_args__ = (Index("browser_sessions_by_expiry", "expires_at"),)

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of the token, which only the browser knows."""
    kind: Mapped[str] = mapped_column(String(8))
    """Kind: session or link."""
    key_id: Mapped[str | None] = mapped_column(ForeignKey("keys.id", ondelete="CASCADE"))
    caller_id: Mapped[str | None] = mapped_column(String(100))
    """ID of an OIDC user, whose project and scopes follow; all three are None for an API key."""
    project: Mapped[str | None] = mapped_column(String(64))
    scopes: Mapped[list[str] | None]
    created_at: Mapped[float]
    expires_at: Mapped[float]


class IdempotencyKey(Base):
    """The job that a request with an Idempotency-Key created."""

    __tablename__ = "idempotency"

    caller: Mapped[str] = mapped_column(String(100), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the request body."""
    job_id: Mapped[str] = mapped_column(String(100))
    """ID of the job that the request created."""
    created_at: Mapped[float] = mapped_column(index=True)


class TaskLease(Base):
    """A lease on a task that only one replica may perform."""

    __tablename__ = "holds"

    task: Mapped[str] = mapped_column(String(40), primary_key=True)
    holder: Mapped[str] = mapped_column(String(100))
    until: Mapped[float]


class Webhook(Base):
    """A subscription to a project's job events."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    project: Mapped[str | None] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(String(128))
    """Secret that signs deliveries; stored in plain text because HMAC requires it."""
    events: Mapped[list[str]]
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(String(100))


class Delivery(Base):
    """Delivery of one event to one webhook, until it is accepted or abandoned."""

    __tablename__ = "deliveries"
    __table_args__ = (
        UniqueConstraint("webhook_id", "job_id", "version"),
        Index("deliveries_due", "state", "not_before"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(String(100))
    """ID of the job; `ping-` followed by a random number for a test delivery."""
    version: Mapped[int]
    body: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    """State: waiting, taken (accepted by the receiver) or given_up."""
    tries: Mapped[int]
    """Number of delivery attempts started."""
    not_before: Mapped[float]
    """Earliest time of the next delivery attempt."""
    answer: Mapped[str] = mapped_column(Text)
    """Outcome of the last delivery attempt."""
    created_at: Mapped[float]
    tried_at: Mapped[float | None]


class RegisteredEncoder(Base):
    """A published encoder, as last read from its card under the storage root. The card is authoritative."""

    __tablename__ = "encoders"
    __table_args__ = (Index("encoders_by_time", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    """ID of the encoder, which is also the name of its folder."""
    project: Mapped[str] = mapped_column(String(64))
    """Project of the job that trained or imported the encoder; `default` if no job did."""
    job_id: Mapped[str | None] = mapped_column(String(100))
    created_at: Mapped[float]
    card: Mapped[dict[str, Any]]
    stamp: Mapped[str] = mapped_column(String(64), default="")
    """Fingerprint of the card file; changes with its content."""
    seen_at: Mapped[float]


class Alias(Base):
    """A name in a project that points to an encoder and can be moved to a different encoder."""

    __tablename__ = "aliases"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    encoder_id: Mapped[str] = mapped_column(String(200))
    moves: Mapped[int]
    """Number of times the alias has been moved. Used for optimistic locking: a move fails if this number has changed
    since it was read."""
    changed_at: Mapped[float]
    changed_by: Mapped[str] = mapped_column(String(100))


class AliasMove(Base):
    """Record of one move of an alias, written together with the move. Immutable."""

    __tablename__ = "alias_moves"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    encoder_id: Mapped[str | None] = mapped_column(String(200))
    """New target, or None if the alias was deleted."""
    at: Mapped[float]
    actor: Mapped[str] = mapped_column(String(100))


class Deletion(Base):
    """Record of a deleted encoder or deployment: what was deleted, by whom, and whether its files have been removed.

    Written together with the deletion and never removed. Deleted jobs keep their rows in the jobs table instead.
    """

    __tablename__ = "deletions"
    __table_args__ = (
        Index("deletions_of_object", "kind", "object_id"),
        Index("deletions_pending", "done_at"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(16))
    """Kind of the deleted object: encoder or deployment."""
    object_id: Mapped[str] = mapped_column(String(200))
    project: Mapped[str | None] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(String(100))
    at: Mapped[float]
    done_at: Mapped[float | None]
    """Time at which the files were removed; None if files may still exist."""


class ProjectSettings(Base):
    """Scheduling policy of a project: its share, quotas and budgets. Projects without a row have the defaults."""

    __tablename__ = "projects"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    policy: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    changed_at: Mapped[float]
    changed_by: Mapped[str] = mapped_column(String(100))


class StoredBytes(Base):
    """Size of a project's files under the storage root, as last measured."""

    __tablename__ = "stored_bytes"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    measured_at: Mapped[float]


class AuditEntry(Base):
    """A change that a user made. Written together with the change and never modified."""

    __tablename__ = "audit"
    __table_args__ = (
        Index("audit_by_time", "at", "id"),
        Index("audit_of_project", "project", "at", "id"),
        Index("audit_of_target", "target", "at", "id"),
        Index("audit_by_action", "action", "at", "id"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    at: Mapped[float]
    actor: Mapped[str] = mapped_column(String(100))
    """ID of the API key or OIDC subject that made the change."""
    project: Mapped[str | None] = mapped_column(String(64))
    """Project of the target; None if it belongs to no project."""
    action: Mapped[str] = mapped_column(String(40))
    """Kind of the target and verb, such as `job.cancel`."""
    target: Mapped[str] = mapped_column(String(200))
    """ID or name of the changed object."""
    outcome: Mapped[str] = mapped_column(String(200))
    """Result of the change, such as the job's new state."""


class GarbageCollection(Base):
    """A completed garbage collection. Dry runs are not recorded."""

    __tablename__ = "collections"
    __table_args__ = (Index("collections_by_time", "started_at"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    started_at: Mapped[float]
    ended_at: Mapped[float]
    actor: Mapped[str] = mapped_column(String(100))
    """ID of the API key or OIDC subject that started it, or `service` if it was periodic."""
    items: Mapped[int]
    """Number of removals made."""
    skipped: Mapped[int]
    """Number of planned removals that were not made."""
    files: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)
    """Total size of the removed files."""
    rows: Mapped[int]
    """Number of rows removed from the database."""
