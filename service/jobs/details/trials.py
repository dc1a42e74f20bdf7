"""Stop individual trials of a running sweep, through a file that its driver reads. Blocks on the storage root."""

from __future__ import annotations

from amd.storage import join, read_json
from amd.training.run_folder import run_folder
from service.db.models import Job
from service.jobs.schemas import ACTIVE, TrialView
from service.jobs.store import JobStore, StaleJob
from service.jobs.views import trial_view
from service.web.errors import IllegalAction, NotFound
from tune_spaces.ledger import TRIALS
from tune_spaces.stop_requests import request_stop, requested_stops


def write_stop_request(root: str, job: Job, number: int, actor: str) -> tuple[TrialView, bool]:
    """Request that a trial stop. Returns the trial, and whether the request is new.

    Raises NotFound if there is no such trial, or IllegalAction if it is not running or the job is not a sweep.
    """
    if job.kind != "search":
        raise IllegalAction(f"cannot stop trial {number} of {job.id}: the job is not a sweep", allowed_actions=[])
    folder = run_folder(root, job.id)
    try:
        record = read_json(join(folder, TRIALS, f"{number:04d}.json"))
    except FileNotFoundError:
        raise NotFound(f"{job.id} has no trial {number}") from None
    if job.state not in ACTIVE or record["state"] != "running":
        state = record["state"] if job.state in ACTIVE else f"not running, because the sweep is {job.state}"
        raise IllegalAction(f"cannot stop trial {number} of {job.id}: it is {state}", allowed_actions=[])
    stops = requested_stops(folder)
    if number not in stops:
        request_stop(folder, number, actor)
    return trial_view(record, {number}), number not in stops


def record_stop_request(store: JobStore, job_id: str, number: int, actor: str) -> None:
    """Record the request in the job's history."""
    while True:
        try:
            store.change(store.get(job_id), "stop_trial", actor=actor, data={"trial": number})
            return
        except StaleJob:
            continue
