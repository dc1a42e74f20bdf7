"""Determine which project owns a run, a job's folder or an encoder under the storage root.

- A job owns its run, and the runs that it starts: trials, and the teacher that it trains first.
- An encoder belongs to the project of the job that trained or imported it, as recorded in its card and its run.
- Everything else, created by `amd train` or `ray job submit` outside the service, belongs to `default`.

Owners are looked up in the database, and under the storage root if the database has no record of them. Each job's
folder records its project, so that a lost database can be rebuilt. Does not use HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from amd.artifacts.card import Card
from amd.artifacts.discovery import CARD, encoder_folder
from amd.config.tasks import ENCODER_ID
from amd.storage import join, read_json
from amd.training.run_folder import FACTS, run_folder
from service.db.models import Job, RegisteredEncoder
from service.jobs.execution.protocol import JobFolder
from service.web.schemas import DEFAULT_PROJECT

_ID = re.compile(rf"(?=.{{1,200}}$){ENCODER_ID}")  # anything else is not an ID, and possibly not a valid file name


class Owner(NamedTuple):
    """The project that owns an encoder or a run, and the job that created it."""

    project: str
    job_id: str | None
    """ID of the job; None if the object was created outside the service."""


NO_JOB = Owner(DEFAULT_PROJECT, None)


class StorageOwners:
    """Looks up owners in the database and under the storage root. Methods may raise StorageError."""

    def __init__(self, engine: Engine, root: str, read_json: Callable[[str], Any] = read_json) -> None:
        """`read_json` reads a JSON file under the storage root."""
        self._reading = engine.execution_options(reads_only=True)
        self._root, self._read_json = root, read_json

    def of_run(self, run_id: str) -> str | None:
        """Return the project of a run or job, or None if it does not exist."""
        if (owner := self._job(run_id)) is not None:
            return owner.project
        if (facts := self._facts(run_id)) is None:
            return None
        if not facts.get("job"):
            return NO_JOB.project
        owner = self._job(str(facts["job"]))
        # Once its job is gone, a teacher's run belongs to the owner of its encoder.
        return owner.project if owner is not None else self._indexed(run_id) or NO_JOB.project

    def of_encoder(self, encoder_id: str) -> str | None:
        """Return the project of an encoder, or of the job that will publish it. Return None if neither exists."""
        if (project := self._indexed(encoder_id)) is not None:
            return project
        card = self._read(encoder_id, join(encoder_folder(self._root, encoder_id), CARD))
        if card is not None:  # published since the last scan
            return self._publisher(card.get("job"), card.get("run")).project
        return self.of_run(encoder_id)

    def of_card(self, card: Card) -> Owner:
        """Return the owner of an encoder that is not indexed yet."""
        return self._publisher(card.job, card.run)

    def _publisher(self, job_id: str | None, run_id: str | None) -> Owner:
        """Return the owner of an encoder, given the job and the run recorded in its card."""
        if job_id:  # an import, whose card may be a copy that still names another encoder's run
            return self._job(job_id) or NO_JOB
        if not run_id:
            return NO_JOB
        if (owner := self._job(run_id)) is not None:
            return owner
        parent = (self._facts(run_id) or {}).get("job")
        return (self._job(str(parent)) if parent else None) or NO_JOB

    def _job(self, job_id: str) -> Owner | None:
        """Return the owner of a job's runs and encoders, or None if there is no such job."""
        with Session(self._reading) as session:
            row = session.execute(select(Job.project, Job.origin).where(Job.id == job_id)).first()
        if row is not None:
            return Owner(row.project, job_id if row.origin == "api" else None)
        request = self._read(job_id, JobFolder(self._root, job_id).request)
        return None if request is None else Owner(str(request.get("project") or DEFAULT_PROJECT), job_id)

    def _indexed(self, encoder_id: str) -> str | None:
        with Session(self._reading) as session:
            query = select(RegisteredEncoder.project).where(RegisteredEncoder.id == encoder_id)
            return session.scalar(query)

    def _facts(self, run_id: str) -> dict[str, Any] | None:
        return self._read(run_id, join(run_folder(self._root, run_id), FACTS))

    def _read(self, name: str, url: str) -> dict[str, Any] | None:
        """Return a JSON object from the folder of a run or job, or None if it does not exist or cannot be read."""
        if not _ID.fullmatch(name):
            return None
        try:
            found = self._read_json(url)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None
