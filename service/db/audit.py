"""Write audit entries. An entry is written in its change's transaction, so that neither exists without the other."""

from __future__ import annotations

import secrets
import time

from sqlalchemy.orm import Session

from service.db.models import AuditEntry


def record_change(session: Session, actor: str, action: str, target: str, project: str | None, outcome: str) -> None:
    """Add a change's audit entry to the session that makes the change."""
    session.add(
        AuditEntry(
            id=secrets.token_hex(12),
            at=time.time(),
            actor=actor,
            project=project,
            action=action,
            target=target,
            outcome=outcome,
        )
    )
