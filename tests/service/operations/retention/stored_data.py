"""Random storage roots for retention tests: runs, jobs, sweeps and encoders with references between them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db.models import Alias, Attempt, Deployment, Job, JobEvent
from service.jobs.schemas import ENDED
from tests.support.service.fake_cluster import new_job

DAY_S = 86_400.0
LIVE = ("queued", "running", "paused", "retrying")
REFERENCES = (
    "{id}",
    "{root}/runs/{id}/checkpoints/step-00000001",
    "file://{root}/jobs/{id}/output",
    "{root}/runs/{id}",
)


class StoredItem(NamedTuple):
    """A run with or without a job, and the files that it left under the storage root."""

    is_sweep: bool
    state: str | None
    """State of its job, or of an external run; None for a run that is not in the database."""
    origin: str
    days: int
    """Days since its last change."""
    has_encoder: bool
    has_manifest: bool
    has_facts: bool
    refers_to: int
    """Index of the item that its config refers to, modulo the number of items; its own index refers to nothing."""
    reference: str
    alias: bool
    size: int


ITEMS = st.lists(
    st.builds(
        StoredItem,
        is_sweep=st.booleans(),
        state=st.sampled_from([*sorted(ENDED - {"deleting"}), *LIVE, None]),
        origin=st.sampled_from(["api", "api", "external"]),
        days=st.sampled_from([1, 30, 90]),
        has_encoder=st.sampled_from([False, False, True]),
        has_manifest=st.booleans(),
        has_facts=st.sampled_from([True, True, False]),
        refers_to=st.integers(0, 5),
        reference=st.sampled_from(REFERENCES),
        alias=st.booleans(),
        size=st.integers(0, 300),
    ),
    min_size=1,
    max_size=6,
)


class StoredData:
    """Items stored under a storage root and in a database."""

    def __init__(self, root: Path, engine: Engine, items: Sequence[StoredItem]) -> None:
        self.root, self._engine, self.items = root, engine, items
        for number, item in enumerate(items):
            self._write(number, item)

    def id(self, number: int) -> str:
        return f"{'search' if self.items[number].is_sweep else 'train'}-{number}"

    def trials(self, number: int) -> list[str]:
        return [f"{self.id(number)}-000{trial}-s0" for trial in range(2)] if self.items[number].is_sweep else []

    def in_use(self) -> set[str]:
        """Return the IDs that must be kept, derived from the items rather than from files."""
        found = set[str]()
        for number, item in enumerate(self.items):
            if item.state in LIVE and (item.origin == "api" or item.state == "running"):
                found |= {self.id(number), *self.trials(number)}
            if item.has_encoder:
                found.add(self.id(number))
        while new := {self.id(target) for number, target in self._references() if self.id(number) in found} - found:
            found |= new
        return found

    def files(self) -> dict[str, int]:
        """Return the size of each file under the root."""
        return {
            str(path.relative_to(self.root)): path.lstat().st_size for path in self.root.rglob("*") if path.is_file()
        }

    def _references(self) -> Iterator[tuple[int, int]]:
        for number, item in enumerate(self.items):
            target = item.refers_to % len(self.items)
            if target != number:
                yield number, target

    def _write(self, number: int, item: StoredItem) -> None:
        id, ended = self.id(number), item.state in ENDED
        target = dict(self._references()).get(number)
        weights = "" if target is None else item.reference.format(id=self.id(target), root=self.root)
        config = {"name": id, "storage": str(self.root), "teacher": {"weights": weights}}
        owner = id if item.origin == "api" and item.state is not None else None
        if item.state is not None:
            self._add_row(id, item, config)
        self._write_run(id, item, config, owner, ended or item.state is None)
        for trial in self.trials(number):
            self._write_run(trial, item, {"name": trial}, owner or id, is_ended=True)
            self._file(item, f"runs/{id}/trials/{trial[-7:-3]}.json", json.dumps({"state": "stopped", "runs": [trial]}))
        if owner is not None:
            self._file(item, f"jobs/{id}/config.json", json.dumps(config))
            self._file(item, f"jobs/{id}/logs/0001/0000000000000000.log", "l" * item.size)
            self._file(item, f"jobs/{id}/output/part.tar", "o" * item.size)
            self._file(item, f"jobs/{id}/.part.tar.0123abcd", "unfinished")
        if item.has_encoder:
            self._file(item, f"encoders/{id}/encoder.json", json.dumps({"id": id, "run": id, "config": config}))
        self._file(item, f"encoders/{id}/encoder.safetensors", "e" * item.size)

    def _write_run(self, id: str, item: StoredItem, config: dict[str, Any], owner: str | None, is_ended: bool) -> None:
        for name, content in run_files(id, config, owner, item.size).items():
            is_left_out = (name == "run.json" and not item.has_facts) or (
                name.endswith("/manifest.json") and not item.has_manifest
            )
            if not is_left_out:
                self._file(item, f"runs/{id}/{name}", content)
        if is_ended:
            self._file(item, f"runs/{id}/result.json", json.dumps({"state": "failed"}))

    def _file(self, item: StoredItem, path: str, content: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        at = time.time() - item.days * DAY_S
        os.utime(file, (at, at))

    def _add_row(self, id: str, item: StoredItem, config: dict[str, Any]) -> None:
        at = time.time() - item.days * DAY_S
        ended_at = at if item.state in ENDED else None
        job = new_job(id=id, state=item.state, origin=item.origin, config=config, created_at=at, changed_at=at)
        job.ended_at, job.version, job.attempt = ended_at, 1, 1
        job.kind = "search" if item.is_sweep else "train"
        values = {"submission_id": id, "started_at": at, "ended_at": at, "state": "failed", "message": ""}
        with Session(self._engine) as session, session.begin():
            session.add(job)
            session.flush()
            session.add(JobEvent(job_id=id, version=1, at=at, type="created", actor="test", data={}))
            session.add(Attempt(job_id=id, number=1, reason=None, outcome=None, **values))
            if item.alias and item.has_encoder:
                moved = {"moves": 1, "changed_at": at, "changed_by": "test"}
                session.add(Alias(project="default", name=f"alias-{id}", encoder_id=id, **moved))
                session.add(_deployment(id, at))


def run_files(id: str, config: dict[str, Any], owner: str | None, size: int) -> dict[str, str]:
    """Return the files of a run with one checkpoint, owned by the job `owner`; the larger files have `size` bytes."""
    return {
        "config.json": json.dumps(config),
        "run.json": json.dumps({"id": id, "job": owner, "kind": "train"}),
        "checkpoints/step-00000001/model.safetensors": "c" * size,
        "checkpoints/step-00000001/manifest.json": "{}",
        "logs/rank-00000/0000000000000000.log": "r" * size,
    }


def _deployment(encoder: str, at: float) -> Deployment:
    fields: dict[str, Any] = {"project": "default", "share": 0.0, "settings": {}, "serving": {}, "state": "ready"}
    fields |= {"message": "", "created_by": "test", "created_at": at, "changed_at": at, "version": 1}
    return Deployment(name=f"deployed-{encoder}", encoder=f"alias-{encoder}", candidate=None, **fields)


def jobs_in(engine: Engine) -> dict[str, str]:
    """Return the state of each job by ID."""
    with Session(engine) as session:
        return {job.id: job.state for job in session.query(Job)}
