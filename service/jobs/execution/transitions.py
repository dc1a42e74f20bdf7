"""Compute a job's next state from its attempt's outcome, its desired state and its earlier failures.

Only makes the decision; the reconciler applies it. Does not use the database, Ray or the storage root.
"""

from __future__ import annotations

from typing import NamedTuple

from service.db.models import Job
from service.jobs.execution.committed import newest_checkpoint
from service.jobs.execution.protocol import AttemptOutcome
from service.jobs.execution.ray_jobs import RayJobStatus

BACKOFF_S, MAX_BACKOFF_S = 5.0, 300.0


class JobTransition(NamedTuple):
    """A job's next state, with its reason and message."""

    state: str
    reason: str | None
    message: str


def outcome_of_lost(job: Job, ray_job: RayJobStatus | None, *, started: bool) -> AttemptOutcome:
    """Derive the outcome of an attempt that reported none. `started` is whether the attempt ever sent a heartbeat."""
    if job.wanted != "run":
        message = "exited without reporting a result; its newest checkpoint is kept"
        return AttemptOutcome(state="cancelled", reason="deadline_exceeded", message=message)
    if ray_job is not None and ray_job.status == "STOPPED":
        message = "stopped through Ray, not the service"
        return AttemptOutcome(state="cancelled", reason="cancelled_by_user", message=message)
    if ray_job is None:
        return AttemptOutcome(state="failed", reason="node_lost", message="the cluster no longer knows the job")
    lines = [line for line in ray_job.message.splitlines() if line.strip()]
    if started:
        message = "the driver exited without reporting a result" + (f"; Ray reports: {lines[0][:300]}" if lines else "")
    else:  # the last line of a traceback names the error
        message = f"the driver could not start: {lines[-1][:300] if lines else 'Ray reports no reason'}"
    return AttemptOutcome(state="failed", reason="node_lost", message=message, log_tail=ray_job.message)


def next_transition(job: Job, outcome: AttemptOutcome, stopped_through_ray: bool, failures: int = 1) -> JobTransition:
    """Return the job's next state, given its attempt's outcome and its desired state.

    `failures`: retryable failures, including this one, since the job last committed work.
    """
    if outcome.state == "succeeded":
        return JobTransition("succeeded", None, outcome.message)
    if job.wanted == "cancel":
        reason = outcome.reason if outcome.reason == "deadline_exceeded" else "cancelled_by_user"
        return JobTransition("cancelled", reason, outcome.message)
    if job.wanted == "pause" and (outcome.state == "cancelled" or outcome.retryable):
        return JobTransition("paused", None, outcome.message)
    if job.wanted == "preempt" and (outcome.state == "cancelled" or outcome.retryable):
        message = "preempted by a job of higher priority; resuming from the newest checkpoint"
        return JobTransition("queued", None, message)
    if job.wanted == "limit":
        message = f"time_limit_s={job.time_limit_s:g} has passed. {outcome.message}".strip()
        return JobTransition("failed", "time_limit", message)
    if outcome.state == "cancelled":
        if outcome.asked_to_stop and outcome.reason == "cancelled_by_user" and not stopped_through_ray:
            return JobTransition("queued", None, "the node was lost; resuming from the newest checkpoint")
        return JobTransition("cancelled", outcome.reason, outcome.message)
    if outcome.retryable and job.max_retries:
        step = newest_checkpoint(job, outcome.committed)
        since = f" since step {step}" if step else ""
        if failures <= job.max_retries:
            message = f"failure {failures} of {job.max_retries}{since}, retrying after: {outcome.message}"
            return JobTransition("retrying", outcome.reason, message)
        message = f"{outcome.message}; failure {failures}{since}, max_retries={job.max_retries} allows no more"
        return JobTransition("failed", outcome.reason, message)
    return JobTransition("failed", outcome.reason or "unknown", outcome.message)


def backoff_s(retries: int) -> float:
    """Return the delay in seconds before the next retry: 5, 10, 20, …, up to five minutes."""
    return float(min(MAX_BACKOFF_S, BACKOFF_S * 2**retries))
