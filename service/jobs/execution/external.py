"""Runs that were begun outside the service, with `amd train` or `ray job submit`, found on the storage root and shown.

They are read only: nobody can cancel here what was not started here. Trials and teachers that a job makes are its own.
"""

from __future__ import annotations

import contextlib
import logging
import posixpath
import time
from datetime import datetime
from typing import Any

from amd.storage import join, listdir, read_json
from amd.training.lease import Lease
from amd.training.run_folder import CONFIG, FACTS, RESULT, run_folder
from service.db.models import Job
from service.jobs.kinds import KINDS
from service.jobs.store import JobStore, Stale

logger = logging.getLogger(__name__)

LOOK_S = 30.0
WATCHED = 100  # of those that have not succeeded, the newest are looked at again: they may have been continued
PROJECT = "default"


class Discovery:
    """Keeps a row for each run that is not a job's. `look` is cheap where nothing is new."""

    def __init__(self, store: JobStore, root: str) -> None:
        self._store, self._root = store, root
        self._passed: set[str] = set()  # ours, or nothing that can be shown
        self._looked = float("-inf")

    def look(self) -> None:
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        names = [name for name in listdir(join(self._root, "runs")) if name not in self._passed]
        known = self._store.known(names)
        for name in names:
            if name not in known:
                self._carefully(name)
        self._passed.update(known)
        for job in self._store.external(WATCHED):
            self._refresh(job)

    def _carefully(self, name: str) -> None:
        try:
            if not self._add(name):
                self._passed.add(name)
        except FileNotFoundError:
            pass  # a folder that is just being made, or was removed
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("runs/%s cannot be read and is not shown: %s", name, error)
            self._passed.add(name)

    def _add(self, name: str) -> bool:
        folder = run_folder(self._root, name)
        facts = read_json(join(folder, FACTS))
        if facts.get("job") or facts["kind"] not in KINDS:
            return False
        created = datetime.fromisoformat(facts["created"]).timestamp()
        user = (facts.get("host") or {}).get("user") or "unknown"
        workers = (read_json(join(folder, CONFIG)).get("scaling") or {}).get("workers") or [1]
        job = Job(
            id=name,
            project=PROJECT,
            kind=facts["kind"],
            labels={},
            priority=0,
            origin="external",
            created_by=user,
            config=read_json(join(folder, CONFIG)),
            max_retries=0,
            workers=workers[0],
            cpus=0.0,
            device="auto",
            wanted="run",
            attempt=0,
            retries=0,
            not_before=created,
            created_at=created,
            changed_at=created,
            started_at=created,
            **state_of(folder),
        )
        self._store.add(job, user)
        return True

    def _refresh(self, job: Job) -> None:
        found = state_of(run_folder(self._root, job.id))
        if any(getattr(job, name) != value for name, value in found.items() if name != "ended_at"):
            with contextlib.suppress(Stale):
                self._store.change(job, found["state"], **found)


def state_of(folder: str) -> dict[str, Any]:
    """What a run's folder tells of it, as fields of a job."""
    if RESULT in listdir(folder):
        result = read_json(join(folder, RESULT))
        told = {"state": result["state"], "reason": result.get("reason"), "message": result.get("message") or ""}
        return {**told, "result": result, "ended_at": time.time()}
    if Lease(join(folder, "lease.json")).taken_by() is not None:
        return {"state": "running", "reason": None, "message": "", "result": None, "ended_at": None}
    message = f"ended without a word; the same command continues {posixpath.basename(folder)}"
    return {"state": "failed", "reason": "unknown", "message": message, "result": None, "ended_at": time.time()}
