"""Size of each project's files, stored in the database. `service.operations.storage_meter` measures it."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from service.db.models import StoredBytes

GIB = 2**30


class StoredBytesStore:
    """Last measured size of each project's files under the storage root."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    def by_project(self) -> dict[str, int]:
        """Return the number of bytes stored by each project with files; empty before the first measurement."""
        with Session(self._reading) as session:
            return dict(session.execute(select(StoredBytes.project, StoredBytes.bytes)).tuples().all())

    def replace(self, found: Mapping[str, int], now: float) -> None:
        """Replace the previous measurement with a new one."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(StoredBytes))
            session.add_all(StoredBytes(project=name, bytes=size, measured_at=now) for name, size in found.items())
