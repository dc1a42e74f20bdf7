"""Which project owns a run, a job's folder or an encoder under the storage root.

- A job owns its run, and the runs that it starts: trials, and the teacher that it trains first.
- An encoder belongs to the project of the job that trained or imported it, which its card and its run name.
- What no job made belongs to `default`: runs and encoders of `amd train` or `ray job submit` outside the service.

The database is asked first. What it does not know yet, or no longer, is read from the storage root: the job's folder
contains its project, so that a lost database can be rebuilt. Does not use HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from amd.artifacts.card import Card
from amd.artifacts.discovery import CARD, encoder_folder
from amd.config.tasks import ENCODER_ID
from amd.storage import join, read_json
from amd.training.run_folder import FACTS, run_folder
from service.db.models import Job, RegisteredEncoder
from service.jobs.execution.protocol import JobFolder
from service.web.schemas import DEFAULT_PROJECT

_ID = re.compile(rf"(?=.{{1,200}}$){ENCODER_ID}")  # other names are no ids, and might not even be file names


class EncoderOwner(NamedTuple):
    """The project that owns an encoder, and the job that published it."""

    project: str
    job_id: str | None
    """ID of the job, or None if no job did."""


class StorageOwners:
    """Looks up owners in the database and under the storage root. Methods may raise StorageError."""

    def __init__(self, engine: Engine, root: str) -> None:
        self._reading = engine.execution_options(reads_only=True)
        self._root = root

    def of_run(self, run_id: str) -> str | None:
        """Return the project of a run or job, or None if it does not exist."""
        if not _ID.fullmatch(run_id):
            return None
        with Session(self._reading) as session:
            found = session.get(Job, run_id) or session.get(RegisteredEncoder, run_id)
        if found is not None:
            return found.project
        if (project := self._recorded(run_id)) is not None:
            return project
        facts = self._facts(run_id)
        if facts is None:
            return None
        return self._of_job(str(facts["job"])) if facts.get("job") else DEFAULT_PROJECT

    def of_encoder(self, encoder_id: str) -> str | None:
        """Return the project of an encoder, or of the job that will publish it, or None if there is neither."""
        if not _ID.fullmatch(encoder_id):
            return None
        with Session(self._reading) as session:
            found = session.get(RegisteredEncoder, encoder_id)
        if found is not None:
            return found.project
        card = _read(join(encoder_folder(self._root, encoder_id), CARD))
        if card is not None:  # published since the last scan
            return self._of_published(card.get("job"), card.get("run")).project
        return self.of_run(encoder_id)

    def of_card(self, card: Card) -> EncoderOwner:
        """Return the owner of an encoder that is not indexed yet."""
        return self._of_published(card.job, card.run)

    def _of_published(self, job_id: str | None, run_id: str | None) -> EncoderOwner:
        for candidate in self._candidate_jobs(job_id, run_id):
            with Session(self._reading) as session:
                found = session.get(Job, candidate)
            if found is not None and found.origin == "api":
                return EncoderOwner(found.project, found.id)
            if found is None and (project := self._recorded(candidate)) is not None:
                return EncoderOwner(project, candidate)
        return EncoderOwner(DEFAULT_PROJECT, None)

    def _candidate_jobs(self, job_id: str | None, run_id: str | None) -> Iterator[str]:
        """Yield the jobs that may have published an encoder, given the job and the run that its card names."""
        if job_id:  # an import; its card may have been copied from another encoder, together with the name of a run
            yield job_id
        elif run_id:
            yield run_id
            parent = (self._facts(run_id) or {}).get("job")
            if parent:
                yield str(parent)

    def _of_job(self, job_id: str) -> str:
        with Session(self._reading) as session:
            found = session.get(Job, job_id)
        return found.project if found is not None else self._recorded(job_id) or DEFAULT_PROJECT

    def _recorded(self, job_id: str) -> str | None:
        """Return the project in a job's folder, or None if there is no such folder."""
        request = _read(JobFolder(self._root, job_id).request)
        return None if request is None else str(request.get("project") or DEFAULT_PROJECT)

    def _facts(self, run_id: str) -> dict[str, Any] | None:
        return _read(join(run_folder(self._root, run_id), FACTS))


def _read(url: str) -> dict[str, Any] | None:
    """Return a JSON object, or None if there is no readable file. A file with other content is an empty object."""
    try:
        found = read_json(url)
    except OSError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
