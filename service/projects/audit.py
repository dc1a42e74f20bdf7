"""Read the audit log. The store of each changed object writes the entries, using `service.db.audit`."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import ColumnElement, Engine, select
from sqlalchemy.orm import Session

from service.db.models import AuditEntry
from service.web.pagination import after, cursor_of

ACTIONS = (
    *("alias.delete", "alias.move", "console.link", "console.session", "deployment.delete", "deployment.put"),
    *("encoder.delete", "gc.collect", "job.cancel", "job.delete", "job.edit", "job.pause", "job.resume", "job.retry"),
    *("job.stop_trial", "job.submit", "key.create", "key.revoke", "project.put"),
    *("webhook.create", "webhook.delete", "webhook.redeliver", "webhook.test"),
)
"""All actions, each with the kind of its target and a verb."""


class AuditFilter(NamedTuple):
    """Filter for a listing; None matches every entry."""

    project: str | None = None
    target: str | None = None
    action: str | None = None
    """Target kind and verb, such as `job.cancel`, or only the kind."""
    actor: str | None = None
    since: float | None = None
    until: float | None = None


class AuditLog:
    """Reads the changes made by users from the database."""

    def __init__(self, engine: Engine) -> None:
        self._reading = engine.execution_options(reads_only=True)

    def list(
        self, where: AuditFilter, cursor: str | None = None, limit: int = 50
    ) -> tuple[list[AuditEntry], str | None]:
        """Return a page of entries, newest first, and the cursor for the next page.

        Raises BadCursor if the cursor is invalid.
        """
        query = select(AuditEntry).order_by(AuditEntry.at.desc(), AuditEntry.id.desc()).limit(limit + 1)
        for column in ("project", "target", "actor"):
            if (value := getattr(where, column)) is not None:
                query = query.where(getattr(AuditEntry, column) == value)
        if where.action is not None:
            query = query.where(_matches(where.action))
        if where.since is not None:
            query = query.where(AuditEntry.at >= where.since)
        if where.until is not None:
            query = query.where(AuditEntry.at < where.until)
        if cursor:
            query = query.where(after(cursor, AuditEntry.at, AuditEntry.id))
        with Session(self._reading, expire_on_commit=False) as session:
            found = list(session.scalars(query))
        last = found[limit - 1] if len(found) > limit else None
        return found[:limit], cursor_of(last.at, last.id) if last is not None else None


def _matches(action: str) -> ColumnElement[bool]:
    if "." in action:
        return AuditEntry.action == action
    return AuditEntry.action.startswith(f"{action}.", autoescape=True)
