"""Garbage collection history in the database. Dry runs and collections without a database are not recorded."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from service.db.audit import record_change
from service.db.models import GarbageCollection
from service.jobs.store import SERVICE

KEPT_S = 30 * 86_400.0


def record_collection(engine: Engine, collection: GarbageCollection, planned: int) -> None:
    """Add a completed collection and remove old entries. A user's collection is also added to the audit log."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        session.execute(delete(GarbageCollection).where(GarbageCollection.started_at < collection.started_at - KEPT_S))
        session.add(collection)
        if collection.actor != SERVICE:
            outcome = f"removed {collection.items} of {planned}"
            record_change(session, collection.actor, "gc.collect", "gc", None, outcome)


def last_collections(engine: Engine, limit: int) -> Sequence[GarbageCollection]:
    """Return the latest collections, newest first."""
    query = select(GarbageCollection).order_by(GarbageCollection.started_at.desc(), GarbageCollection.id.desc())
    with Session(engine.execution_options(reads_only=True), expire_on_commit=False) as session:
        return list(session.scalars(query.limit(limit)))
