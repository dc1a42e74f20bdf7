"""Plan what a retention policy removes, given an inventory of the database and the storage root. Performs no I/O.

Each removal lists its files, so a dry run knows their exact size, and the actual collection removes exactly those
files. Nothing that belongs to a protected ID is removed: an ID that is in use, or that something in use refers to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from amd.artifacts.discovery import CARD
from amd.storage import TEMPORARY_NAME, StoredFile
from amd.training.checkpoints.listing import CHECKPOINTS, MANIFEST
from amd.training.run_folder import FACTS, RESULT
from service.jobs.schemas import DELETED, ENDED
from service.operations.retention.policy import RemovalKind, RetentionPolicy
from tune_spaces.ledger import TRIALS, sweep_of

DAY_S = 86_400.0
LOGS = "logs"
UNFINISHED_RUN = "paused"  # state of a run that will continue, although it has a result

_CHECKPOINT = re.compile(rf"runs/[^/]+/{CHECKPOINTS}/step-[0-9]+/")

Files = Mapping[str, StoredFile]  # by path


class JobRecord(NamedTuple):
    """The columns of a job's row that retention depends on."""

    id: str
    origin: str
    state: str
    version: int
    ended_at: float
    """Time when the job ended; for a deleted job, or if that is unknown, the time of its last change."""


class Inventory(NamedTuple):
    """What exists and what is in use."""

    now: float
    runs: Mapping[str, Files]
    """Files of each folder in `runs/`, keyed by path relative to the folder."""
    jobs: Mapping[str, Files]
    encoders: Mapping[str, Files]
    records: Mapping[str, JobRecord]
    """Jobs by ID. Empty without a database."""
    results: Mapping[str, str]
    """State recorded in the result of each run that has a result and may lose files."""
    protected: frozenset[str]
    """IDs that are in use, or that something in use refers to."""
    rows: Mapping[RemovalKind, int] = {}
    """Number of database rows due for removal, for data that is stored only in the database."""


class Removal(NamedTuple):
    """Files and rows that are removed together."""

    kind: RemovalKind
    id: str
    """ID of the run, job or encoder; empty for rows that belong to none."""
    paths: tuple[str, ...] = ()
    """Paths relative to the storage root, in the order in which the files are removed."""
    size: int = 0
    """Total size of the files in bytes."""
    rows: int = 0
    """Number of database rows."""

    @property
    def run_ids(self) -> set[str]:
        """IDs of the runs whose files are removed."""
        return {path.split("/")[1] for path in self.paths if path.startswith("runs/")}


def plan_removals(inventory: Inventory, policy: RetentionPolicy) -> list[Removal]:
    """Return the removals that the policy calls for. No file is part of more than one removal."""
    return list(_Planner(inventory, policy).plan())


class _Planner:
    def __init__(self, inventory: Inventory, policy: RetentionPolicy) -> None:
        self._inventory, self._policy = inventory, policy
        self._planned = set[str]()  # paths
        self._trials: dict[str, list[str]] = {}
        for run in inventory.runs:
            if (sweep := sweep_of(run)) is not None:
                self._trials.setdefault(sweep, []).append(run)

    def plan(self) -> Iterator[Removal]:
        yield from self._jobs()
        yield from self._trial_runs()
        yield from self._logs()
        yield from self._checkpoints()
        yield from self._orphans()
        yield from self._history()
        for kind, rows in self._inventory.rows.items():
            if rows:
                yield Removal(kind, "", rows=rows)

    def _jobs(self) -> Iterator[Removal]:
        for job in self._inventory.records.values():
            if job.origin != "api" or job.state not in ENDED - DELETED or not self._is_old(job.ended_at, "jobs_days"):
                continue
            trials = self._trials.get(job.id, [])
            if not self._inventory.protected.isdisjoint([job.id, *trials]):
                continue
            yield self._removal("jobs", job.id, self._files(job.id, *trials, sections=("runs", "jobs")), rows=1)

    def _trial_runs(self) -> Iterator[Removal]:
        for sweep, trials in self._trials.items():
            is_sweep = any(path.startswith(f"{TRIALS}/") for path in self._inventory.runs.get(sweep, ()))
            if is_sweep and self._is_old(self._ended_at(sweep), "trials_days"):
                for trial in trials:
                    if trial not in self._inventory.protected:
                        yield from self._nonempty("trials", trial, self._files(trial))

    def _logs(self) -> Iterator[Removal]:
        for id in self._unprotected():
            if self._is_old(self._ended_at(id), "logs_days"):
                files = self._files(id)
                yield from self._nonempty("logs", id, {path: files[path] for path in files if _part(path) == LOGS})

    def _checkpoints(self) -> Iterator[Removal]:
        for id in self._unprotected():
            if self._is_old(self._ended_at(id), "checkpoints_days"):
                files = self._files(id)
                found = {path: files[path] for path in files if _part(path) == CHECKPOINTS and path.startswith("runs/")}
                yield from self._nonempty("checkpoints", id, found)

    def _orphans(self) -> Iterator[Removal]:
        if self._policy.orphans_days is None:
            return
        for id in self._unprotected():
            files = self._files(id)
            if self._is_abandoned(id):
                orphans = files if self._all_old(files) else {}
            else:
                orphans = {
                    path: file
                    for path, file in files.items()
                    if TEMPORARY_NAME.fullmatch(path.rpartition("/")[2]) and self._is_old(file.modified, "orphans_days")
                }
                orphans |= self._uncommitted_checkpoints(files)
                encoder = {path: file for path, file in files.items() if path.startswith("encoders/")}
                if CARD not in self._inventory.encoders.get(id, {CARD: None}) and self._all_old(encoder):
                    orphans |= encoder
            yield from self._nonempty("orphans", id, orphans)

    def _is_abandoned(self, id: str) -> bool:
        """Whether an ID's files are left over from a deleted job or from a run that never started."""
        record = self._inventory.records.get(id) or self._inventory.records.get(sweep_of(id) or "")
        if record is not None:
            return record.state == "deleted"
        has_started = FACTS in self._inventory.runs.get(id, {FACTS: None}) or id in self._trials
        return not has_started and id not in self._inventory.jobs

    def _uncommitted_checkpoints(self, files: Files) -> Files:
        by_folder: dict[str, dict[str, StoredFile]] = {}
        for path, file in files.items():
            if found := _CHECKPOINT.match(path):
                by_folder.setdefault(found[0], {})[path] = file
        uncommitted = dict[str, StoredFile]()
        for folder, found_files in by_folder.items():
            if f"{folder}{MANIFEST}" not in found_files and self._all_old(found_files):
                uncommitted |= found_files
        return uncommitted

    def _history(self) -> Iterator[Removal]:
        for job in self._inventory.records.values():
            if job.state == "deleted" and self._is_old(job.ended_at, "history_days"):
                remains = self._files(job.id, *self._trials.get(job.id, []))
                if job.id not in self._inventory.protected and not remains:
                    yield Removal("history", job.id, rows=1)

    def _unprotected(self) -> list[str]:
        ids = {*self._inventory.runs, *self._inventory.jobs, *self._inventory.encoders}
        return sorted(ids - self._inventory.protected)

    def _ended_at(self, id: str) -> float | None:
        """Return when a run or job ended for good; None if it may continue, or if another service tracks it.

        A trial ends when its sweep ends, because the sweep may start further trials from the trial's checkpoints.
        """
        sweep = sweep_of(id)
        if sweep is not None and sweep in self._inventory.runs:
            return self._ended_at(sweep)
        record = self._inventory.records.get(id)
        if record is not None and record.origin == "api":
            return record.ended_at if record.state in ENDED - DELETED else None
        if id in self._inventory.jobs or self._inventory.results.get(id, UNFINISHED_RUN) == UNFINISHED_RUN:
            return None
        result = self._inventory.runs.get(id, {}).get(RESULT)
        return result.modified if result is not None else None

    def _files(self, *ids: str, sections: Sequence[str] = ("runs", "jobs", "encoders")) -> Files:
        """Return the files of these IDs that no removal includes yet, keyed by path relative to the storage root."""
        return {
            path: file
            for section in sections
            for id in ids
            for name, file in getattr(self._inventory, section).get(id, {}).items()
            if (path := f"{section}/{id}/{name}") not in self._planned
        }

    def _is_old(self, at: float | None, field: str) -> bool:
        days: float | None = getattr(self._policy, field)
        return days is not None and at is not None and self._inventory.now - at > days * DAY_S

    def _all_old(self, files: Files) -> bool:
        return all(self._is_old(file.modified, "orphans_days") for file in files.values())

    def _nonempty(self, kind: RemovalKind, id: str, files: Files) -> Iterator[Removal]:
        if files:
            yield self._removal(kind, id, files)

    def _removal(self, kind: RemovalKind, id: str, files: Files, rows: int = 0) -> Removal:
        self._planned.update(files)
        # Manifests first: a checkpoint without one is never read, so it is safe to interrupt a removal.
        paths = sorted(files, key=lambda path: (not path.endswith(f"/{MANIFEST}"), path))
        return Removal(kind, id, tuple(paths), sum(file.size for file in files.values()), rows)


def _part(path: str) -> str:
    """Return the first part of a file's path within its run or job folder."""
    return path.split("/")[2]
