"""Database tables for deployments and their revisions. `models` lists them with the other tables."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base


class Deployment(Base):
    """A deployment: encoders to serve, and their settings."""

    __tablename__ = "deployments"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    encoder: Mapped[str] = mapped_column(String(200))
    """Encoder ID, or an alias in the project. If the alias moves, the deployment follows it."""
    candidate: Mapped[str | None] = mapped_column(String(200))
    """Encoder that serves a fraction of the requests."""
    share: Mapped[float]
    settings: Mapped[dict[str, Any]]
    serving: Mapped[dict[str, str]]
    """Encoder IDs last sent to the replicas, for `encoder` and `candidate`."""
    state: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    replicas: Mapped[int] = mapped_column(server_default="0", default=0)
    """Number of replicas that hold resources, as last observed."""
    created_by: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[float]
    changed_at: Mapped[float]
    version: Mapped[int]


class DeploymentRevision(Base):
    """Immutable snapshot of a deployment's settings, written in the same transaction as the change to them.

    Deleting a deployment deletes its revisions too, because another project may reuse the name.
    """

    __tablename__ = "deployment_revisions"

    deployment: Mapped[str] = mapped_column(ForeignKey("deployments.name", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """Number of the revision, starting at 1 for each deployment."""
    created_at: Mapped[float]
    actor: Mapped[str] = mapped_column(String(100))
    encoder: Mapped[str] = mapped_column(String(200))
    candidate: Mapped[str | None] = mapped_column(String(200))
    share: Mapped[float]
    settings: Mapped[dict[str, Any]]
    resolved: Mapped[dict[str, str]]
    """Encoder IDs that the names resolved to when the change was made, keyed by slot: `main` and `candidate`."""
    restored: Mapped[int | None]
    """Number of the revision that a rollback restored; None for other changes."""
