"""Revisions of deployments: the settings that each change requested, compared field by field.

A change that requests the current settings adds no revision. The newest KEPT revisions of a deployment are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from sqlalchemy import Select, delete, select
from sqlalchemy.orm import Session

from service.db.models import Deployment, DeploymentRevision
from service.serving.protocol import CANDIDATE, MAIN
from service.serving.schemas import RevisionView, ServingSettings
from service.web.schemas import utc_datetime

KEPT = 100  # revisions per deployment


def newest_first(deployment: str) -> Select[DeploymentRevision]:
    """Return the query for a deployment's revisions."""
    query = select(DeploymentRevision).where(DeploymentRevision.deployment == deployment)
    return query.order_by(DeploymentRevision.number.desc())


def add_revision(
    session: Session, deployment: Deployment, actor: str, resolved: Mapping[str, str], restored: int | None
) -> None:
    """Add the deployment's settings as a revision, unless the newest revision has the same; remove the oldest ones.

    The deployment must be locked by the session, or created by it. `resolved`: encoder IDs by slot. `restored`: number
    of the revision that a rollback restored.
    """
    newest = session.scalar(newest_first(deployment.name).limit(1))
    if newest is not None and _fields(newest) == _fields(deployment):
        return
    number = 1 if newest is None else newest.number + 1
    session.add(
        DeploymentRevision(
            deployment=deployment.name,
            number=number,
            created_at=deployment.changed_at,
            actor=actor,
            encoder=deployment.encoder,
            candidate=deployment.candidate,
            share=deployment.share,
            settings=deployment.settings,
            resolved=dict(resolved),
            restored=restored,
        )
    )
    is_old = DeploymentRevision.number <= number - KEPT
    session.execute(delete(DeploymentRevision).where(DeploymentRevision.deployment == deployment.name, is_old))


def revision_views(revisions: Sequence[DeploymentRevision]) -> list[RevisionView]:
    """Return views of a deployment's revisions, newest first, each with the fields that it changed."""
    return [_view(one, before) for one, before in zip_longest(revisions, revisions[1:])]


def cannot_restore(now: Mapping[str, str], before: Mapping[str, str]) -> bool:
    """Whether the aliases of a revision have moved so that its main encoder and its candidate are now the same.

    `now`: encoder IDs by slot that the revision's settings refer to now. `before`: those of the revision.
    """
    return now[MAIN] == now.get(CANDIDATE) and now != before


def _view(one: DeploymentRevision, before: DeploymentRevision | None) -> RevisionView:
    return RevisionView(
        number=one.number,
        created_at=utc_datetime(one.created_at),
        actor=one.actor,
        encoder=one.encoder,
        candidate=one.candidate,
        share=one.share,
        settings=ServingSettings.model_validate(one.settings),
        resolved=one.resolved,
        restored=one.restored,
        changed=None if before is None else _changed_fields(one, before),
    )


def _changed_fields(one: DeploymentRevision, before: DeploymentRevision) -> list[str]:
    known = _fields(before)
    return [name for name, value in _fields(one).items() if value != known[name]]


def _fields(one: Deployment | DeploymentRevision) -> dict[str, Any]:
    """Return the settings keyed by request field, such as `replicas.max`."""
    settings = ServingSettings.model_validate(one.settings).model_dump(mode="json")
    replicas = {f"replicas.{name}": value for name, value in settings.pop("replicas").items()}
    return {"encoder": one.encoder, "candidate": one.candidate, "share": one.share, **replicas, **settings}
