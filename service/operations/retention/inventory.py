"""Take the inventory that a retention plan is based on: the files under a storage root and the rows of a database.

Without a database, only runs that no job owns are considered, based only on the files under the storage root. Removes
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from amd.artifacts.discovery import CARD
from amd.storage import StoredFile, join, read_many, walk_files
from amd.training.lease import Lease
from amd.training.run_folder import CONFIG, FACTS, LEASE, RESULT, run_folder
from service.db.batches import in_batches
from service.db.models import Alias, Deletion, Delivery, Deployment, IdempotencyKey, Job, RegisteredEncoder
from service.jobs.schemas import DELETED, ENDED
from service.jobs.store import IDEMPOTENCY_S
from service.operations.retention.plan import DAY_S, Inventory, JobRecord
from service.operations.retention.policy import RemovalKind, RetentionPolicy
from service.operations.retention.references import reachable, references
from service.webhooks.store import GIVEN_UP, TAKEN
from tune_spaces.ledger import TRIALS, sweep_of

LEASE_CHECK_S = DAY_S  # a lease not renewed for this long has expired, even if the storage clock is wrong
LIVE_BATCH = 200  # number of jobs whose configs are held in memory at a time
DOCUMENTS = {"runs": (FACTS, CONFIG), "jobs": ("request.json", "config.json"), "encoders": (CARD,)}
"""Files that contain references, by section of the storage root."""


def take_inventory(root: str, policy: RetentionPolicy, now: float, engine: Engine | None = None) -> Inventory:
    """List files and rows, and determine which IDs are in use.

    Raises StorageError if the storage root cannot be read, or SQLAlchemyError if the database cannot be read.
    """
    # Rows first: a job submitted during the listing does not count as in use, but its files are too new to remove.
    records = _records(engine) if engine is not None else {}
    sections = {section: _folders(join(root, section)) for section in DOCUMENTS}
    in_use = _InUse(root, sections, engine, records)
    protected = in_use.protected(now)
    return Inventory(
        now=now,
        records=records,
        results=_results(root, sections["runs"], protected, policy, now),
        protected=protected,
        rows=_old_rows(engine, policy, now) if engine is not None else {},
        **sections,
    )


def live_references(engine: Engine, ids: Collection[str], since: float = 0.0) -> set[str]:
    """Return the IDs of unfinished jobs and the IDs they refer to. `since`: only jobs that have changed since then."""
    query = select(Job.id, Job.config, Job.progress).where(Job.state.not_in(ENDED), Job.changed_at >= since)
    found = set[str]()
    with Session(engine.execution_options(reads_only=True)) as session:
        for job_id, config, progress in session.execute(query.execution_options(yield_per=LIVE_BATCH)):
            found |= {job_id, *references([config, progress], ids)}
    return found


def _records(engine: Engine) -> dict[str, JobRecord]:
    query = select(Job.id, Job.origin, Job.state, Job.version, Job.ended_at, Job.changed_at)
    with Session(engine.execution_options(reads_only=True)) as session:
        return {
            id: JobRecord(id, origin, state, version, changed if state in DELETED or ended is None else ended)
            for id, origin, state, version, ended, changed in session.execute(query)
        }


def _folders(url: str) -> dict[str, dict[str, StoredFile]]:
    """Return the files of each subfolder, keyed by path relative to the subfolder."""
    found: dict[str, dict[str, StoredFile]] = {}
    for path, file in walk_files(url).items():
        folder, separator, name = path.partition("/")
        if separator:
            found.setdefault(folder, {})[name] = file
    return found


class _InUse:
    """Determines which IDs are in use, or referred to by something in use."""

    def __init__(
        self,
        root: str,
        sections: Mapping[str, Mapping[str, Mapping[str, StoredFile]]],
        engine: Engine | None,
        records: Mapping[str, JobRecord],
    ) -> None:
        self._root, self._sections, self._engine = root, sections, engine
        self._records = records
        self._ids = frozenset(records).union(*sections.values())

    def protected(self, now: float) -> frozenset[str]:
        live = {*self._leased(now), *self._unfinished()}
        live |= {run for run in self._sections["runs"] if sweep_of(run) in live}
        published = {id for id, files in self._sections["encoders"].items() if CARD in files}
        return reachable({*live, *published, *self._named_in_database()}, self._referenced_by)

    def _leased(self, now: float) -> Iterator[str]:
        """Yield the runs that a process is currently training, whether or not the service started it."""
        for run, files in self._sections["runs"].items():
            lease = files.get(LEASE)
            is_recent = lease is not None and now - lease.modified < LEASE_CHECK_S
            if is_recent and Lease(join(run_folder(self._root, run), LEASE)).taken_by() is not None:
                yield run

    def _unfinished(self) -> set[str]:
        """Return the IDs of unfinished jobs and the IDs they refer to; without a database, all jobs with a folder."""
        if self._engine is not None:
            return live_references(self._engine, self._ids)
        return set(self._sections["jobs"])

    def _named_in_database(self) -> set[str]:
        """Return the encoders that aliases and deployments use, and registered encoders with the IDs they refer to."""
        if self._engine is None:
            return set()
        found = set[str]()
        with Session(self._engine.execution_options(reads_only=True)) as session:
            found.update(session.scalars(select(Alias.encoder_id)))
            for deployment in session.scalars(select(Deployment)):
                values = [deployment.encoder, deployment.candidate, deployment.serving, deployment.settings]
                found |= references(values, self._ids)
            for id, card in session.execute(
                select(RegisteredEncoder.id, RegisteredEncoder.card).execution_options(yield_per=LIVE_BATCH)
            ):
                found |= {id, *references(card, self._ids)}
        return found

    def _referenced_by(self, ids: Collection[str]) -> set[str]:
        urls = [
            join(self._root, section, id, name)
            for id in sorted(ids)
            for section, names in DOCUMENTS.items()
            for name in names
            if name in self._sections[section].get(id, {})
        ]
        found = {sweep for id in ids if (sweep := sweep_of(id)) in self._ids and sweep is not None}
        for batch in in_batches(urls):
            for content in read_many(batch).values():
                found |= references(_parsed(content), self._ids)
        if self._engine is not None:
            for batch in in_batches(sorted(id for id in ids if id in self._records)):
                with Session(self._engine.execution_options(reads_only=True)) as session:
                    for config in session.scalars(select(Job.config).where(Job.id.in_(batch))):
                        found |= references(config, self._ids)
        return found


def _parsed(content: bytes) -> Any:
    """Parse JSON; if it is invalid, return the text itself, which may still contain paths."""
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


def _results(
    root: str,
    runs: Mapping[str, Mapping[str, StoredFile]],
    protected: Collection[str],
    policy: RetentionPolicy,
    now: float,
) -> dict[str, str]:
    """Return the state in the result of each run that may be old enough to lose files."""
    days = [each for each in (policy.trials_days, policy.logs_days, policy.checkpoints_days) if each is not None]
    if not days:
        return {}
    urls = {
        join(run_folder(root, run), RESULT): run
        for run, files in runs.items()
        if RESULT in files and now - files[RESULT].modified > min(days) * DAY_S
        # Even if one trial protects its sweep, the sweep's result is needed for the other trials.
        if run not in protected or any(path.startswith(f"{TRIALS}/") for path in files)
    }
    found = dict[str, str]()
    for batch in in_batches(urls):
        for url, content in read_many(batch).items():
            if isinstance(result := _parsed(content), dict) and isinstance(result.get("state"), str):
                found[urls[url]] = result["state"]
    return found


def _old_rows(engine: Engine, policy: RetentionPolicy, now: float) -> dict[RemovalKind, int]:
    """Count the rows that have no files and are old enough to be removed."""
    with Session(engine.execution_options(reads_only=True)) as session:
        return {
            kind: session.scalar(select(func.count()).select_from(table).where(*conditions)) or 0
            for kind, table, conditions in old_rows(policy, now)
        }


def old_rows(policy: RetentionPolicy, now: float) -> Iterator[tuple[RemovalKind, Any, tuple[Any, ...]]]:
    """Yield (kind, table, conditions) for the rows that have no files and are old enough to be removed."""
    yield "idempotency_keys", IdempotencyKey, (IdempotencyKey.created_at < now - IDEMPOTENCY_S,)
    if policy.deliveries_days is not None:
        ended = Delivery.state.in_((TAKEN, GIVEN_UP))
        yield "deliveries", Delivery, (ended, Delivery.not_before < now - policy.deliveries_days * DAY_S)
    if policy.history_days is not None:
        yield "history", Deletion, (Deletion.done_at < now - policy.history_days * DAY_S,)
