"""Measure a job's committed work, from which a new attempt continues.

A failure after new committed work does not count against the job's retries. A long job may therefore survive any number
of failures, while a job that repeatedly fails at the same point is stopped. Reads only listings and a sweep's ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from amd.storage import files, join, listdir, read_json
from amd.training.checkpoints.listing import newest_step
from amd.training.run_folder import run_folder
from service.db.models import Job
from service.jobs.execution.protocol import JobFolder

OUTPUT_FILES = "output files"
ENDED_TRIALS = "ended trials"


def committed_work(root: str, job: Job) -> dict[str, int]:
    """Return each run's newest checkpoint step, and the numbers of output files and finished trials; omit zeros.

    Raises StorageUnreachable.
    """
    found = {run: newest_step(run_folder(root, run)) for run in {*_runs(job), *_unfinished_trials(root, job)}}
    found[OUTPUT_FILES] = len(files(JobFolder(root, job.id).output))
    if job.kind == "search":
        found[ENDED_TRIALS] = sum(state != "running" for state, _ in _trials(root, job))
    return {name: value for name, value in found.items() if value}


def has_grown(before: Mapping[str, int], now: Mapping[str, int]) -> bool:
    return any(value > before.get(name, 0) for name, value in now.items())


def newest_checkpoint(job: Job, committed: Mapping[str, int]) -> int:
    """Return the step of the newest checkpoint in the run that the job was training, or 0 if there is none."""
    return next((committed[run] for run in reversed(_runs(job)) if run in committed), 0)


def _runs(job: Job) -> list[str]:
    """Return the job's own run and the run it was training, if different: a job may train its teacher first."""
    current = (job.progress or {}).get("run")
    return [job.id, current] if current and current != job.id else [job.id]


def _unfinished_trials(root: str, job: Job) -> Iterator[str]:
    if job.kind == "search":
        for state, runs in _trials(root, job):
            if state == "running":
                yield from runs


def _trials(root: str, job: Job) -> Iterator[tuple[str, list[str]]]:
    """Yield the state and the runs of each trial in a sweep's ledger."""
    folder = join(run_folder(root, job.id), "trials")
    for name in listdir(folder):
        if name.endswith(".json"):
            record = read_json(join(folder, name))
            yield record["state"], record["runs"]
