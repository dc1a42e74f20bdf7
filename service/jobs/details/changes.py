"""Change a job's name, labels and priority, and copy a job with changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amd.storage import join, listdir
from amd.training.checkpoints.listing import CHECKPOINTS, MANIFEST, checkpoint_url
from amd.training.run_folder import run_folder
from service.db.models import Job
from service.jobs.details.schemas import CloneRequest, ForkRequest, JobChange
from service.jobs.schemas import WAITING, CopyRequest
from service.jobs.store import JobStore, StaleJob
from service.projects.store import ProjectStore
from service.web.errors import IllegalAction, NotFound

CHOSEN_BY_SERVICE = ("name", "storage", "output")  # fields of a config that the service sets for each job


def change(store: JobStore, job_id: str, project: str | None, changes: JobChange, actor: str) -> Job:
    """Apply changes to a job.

    Raises NotFound, IllegalAction if the priority can no longer change, or QuotaExceeded if it exceeds the project's
    maximum.
    """
    fields = changes.model_dump(exclude_unset=True)
    if fields.get("labels", ...) is None:
        fields["labels"] = {}
    if fields.get("priority", ...) is None:
        del fields["priority"]
    while True:
        job = store.get(job_id, project)
        new = {name: value for name, value in fields.items() if getattr(job, name) != value}
        if not new:
            return job
        if "priority" in new and job.state not in (*WAITING, "paused"):
            message = (
                f"priority={new['priority']}: {job.id} is {job.state}; "
                "the priority can be changed only while a job is waiting or paused"
            )
            raise IllegalAction(message, allowed_actions=[])
        if "priority" in new:
            ProjectStore(store.engine).check_priority(job.project, new["priority"])
        try:
            return store.edit(job, new, actor)
        except StaleJob:
            continue


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job's config without the fields that the service sets for each job, so that another job can use it."""
    found = {name: value for name, value in config.items() if name not in CHOSEN_BY_SERVICE}
    if isinstance(train := found.get("train"), dict):
        found["train"] = {name: value for name, value in train.items() if name not in CHOSEN_BY_SERVICE}
    return found


def fork_request(job: Job, root: str, changes: ForkRequest) -> CopyRequest:
    """Return the request for a copy of a job that starts from one of the job's checkpoints. Blocks on the storage root.

    Raises IllegalAction if it is not a pre-training job, or NotFound if it has no such checkpoint.
    """
    if job.kind != "train":
        message = f"cannot fork {job.id}: kind={job.kind}, but only pre-training jobs (kind=train) can be forked"
        raise IllegalAction(message, allowed_actions=[])
    url = checkpoint_url(join(run_folder(root, job.id), CHECKPOINTS), changes.step)
    if MANIFEST not in listdir(url):
        raise NotFound(
            f"{job.id} has no checkpoint at step {changes.step}; GET /v1/jobs/{job.id}/checkpoints lists them"
        )
    return clone_request(job, changes.model_copy(update={"overrides": {**changes.overrides, "start": url}}))


def clone_request(job: Job, changes: CloneRequest) -> CopyRequest:
    """Return the request for a copy of a job with changes, in the job's project."""
    return CopyRequest(
        kind=job.kind,
        original_preset=job.preset,
        config=portable_config(job.config),
        overrides=changes.overrides,
        project=job.project,
        name=changes.name if changes.name is not None else job.name,
        labels=changes.labels if changes.labels is not None else job.labels,
        priority=changes.priority if changes.priority is not None else job.priority,
        max_retries=job.max_retries,
        time_limit_s=job.time_limit_s,
    )
