"""Build response models for jobs from database rows and files under the storage root."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from amd.storage import join, listdir, read_json
from amd.training.run_folder import TeacherTraining, run_folder
from service.db.models import Attempt, Job, JobEvent
from service.jobs.actions import allowed_actions
from service.jobs.schemas import (
    AttemptView,
    CheckpointView,
    EventView,
    FailureView,
    JobDetail,
    JobView,
    ProgressView,
    TrialView,
)
from service.projects.usage import hours_of
from service.web.schemas import utc_datetime, utc_datetime_or_none
from tune_spaces.ledger import TRIALS
from tune_spaces.stop_requests import requested_stops


def job_view(job: Job, newest: Attempt | None, root: str) -> JobView:
    return JobView(**_fields(job, newest, root))


def job_detail(job: Job, attempts: Sequence[Attempt], root: str) -> JobDetail:
    newest = attempts[-1] if attempts else None
    views = [
        AttemptView(
            number=attempt.number,
            submission_id=attempt.submission_id,
            state=attempt.state,
            started_at=utc_datetime(attempt.started_at),
            ended_at=utc_datetime_or_none(attempt.ended_at),
            failure=_failure(attempt),
            cpus=attempt.cpus,
            gpus=attempt.gpus,
        )
        for attempt in attempts
    ]
    used = hours_of(attempts, time.time())
    return JobDetail(
        **_fields(job, newest, root), config=job.config, attempts=views, cpu_hours=used.cpus, gpu_hours=used.gpus
    )


def event_view(event: JobEvent) -> EventView:
    return EventView(id=event.version, at=utc_datetime(event.at), type=event.type, actor=event.actor, data=event.data)


def trials(folder: str) -> Iterator[TrialView]:
    """Yield a sweep's trials, read from its ledger."""
    stops = requested_stops(folder)
    for name in listdir(join(folder, TRIALS)):
        if name.endswith(".json"):
            yield trial_view(read_json(join(folder, TRIALS, name)), stops)


def trial_view(record: Mapping[str, Any], stops: Collection[int]) -> TrialView:
    """Return a trial, given its record in the ledger and the numbers of the trials that were asked to stop."""
    rungs = record.get("rungs", [])
    return TrialView(
        number=record["number"],
        state=record["state"],
        point=record["point"],
        overrides=record.get("overrides") or {},
        score=rungs[-1]["score"] if rungs else None,
        rungs=rungs,
        message=record.get("message") or "",
        stop_requested=record["state"] == "running" and record["number"] in stops,
    )


def checkpoints(folder: str) -> Iterator[CheckpointView]:
    """Yield committed checkpoints: those with a manifest, which is written last."""
    for name in listdir(join(folder, "checkpoints")):
        url = join(folder, "checkpoints", name)
        if name.startswith("step-") and "manifest.json" in listdir(url):
            yield CheckpointView(step=int(name.removeprefix("step-")), url=url)


def _fields(job: Job, newest: Attempt | None, root: str) -> dict[str, Any]:
    encoder = (job.result or {}).get("encoder_folder")
    return {
        **{name: getattr(job, name) for name in _COPIED},
        "allowed_actions": allowed_actions(job),
        **{name: utc_datetime_or_none(getattr(job, name)) for name in _TIMES},
        "progress": _progress(job),
        "teacher": _teacher(job),
        "failure": _failure(newest) if newest is not None else None,
        "encoder": posixpath.basename(encoder) if encoder else None,
        "run_folder": run_folder(root, job.id),
    }


_TIMES = ("created_at", "changed_at", "started_at", "ended_at")
_COPIED = (
    *("id", "project", "kind", "name", "labels", "priority", "origin", "created_by", "preset", "state", "reason"),
    *("message", "attempt", "max_retries", "time_limit_s", "workers", "result"),
)


def _progress(job: Job) -> ProgressView | None:
    if not job.progress:
        return None
    known = {name: value for name, value in job.progress.items() if name in ProgressView.model_fields}
    run = job.progress.get("run")
    teacher = job.kind == "train" and run is not None and run != job.id  # a job's run has its ID
    return ProgressView(**known, teacher=teacher, at=utc_datetime(job.changed_at))


def _teacher(job: Job) -> TeacherTraining | None:
    """Return the training of a job's teacher, reported with the progress of the running attempt or with its result."""
    found = (job.progress or {}).get("trained_teacher") or (job.result or {}).get("teacher")
    return TeacherTraining(**{name: found[name] for name in TeacherTraining.model_fields}) if found else None


def _failure(attempt: Attempt) -> FailureView | None:
    if attempt.state != "failed" or attempt.outcome is None:
        return None
    outcome = attempt.outcome
    reason = cast(Any, attempt.reason or "unknown")
    tail = outcome.get("log_tail") or ""
    return FailureView(reason=reason, message=attempt.message, rank=outcome.get("rank"), log_tail=tail)
