"""Actions on jobs: which actions each state allows, and which fields each action sets.

An action only records the desired state; the reconciler applies it. Does not use HTTP, Ray or the storage root.

    queued → starting → running → succeeded | failed | cancelled
    retrying (after an infrastructure failure) → starting      pausing → paused → queued      cancelling → cancelled
    succeeded | failed | cancelled → deleting → deleted
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from service.db.models import Job
from service.jobs.schemas import ACTIVE, Action
from service.jobs.store import JobStore, StaleJob
from service.web.errors import IllegalAction

STOP_GRACE_S = 30.0  # added to checkpoint.deadline_s: time for notifying workers and collecting their reports
CHECKPOINT_DEADLINE_S = 60.0  # default for configs without checkpoint.deadline_s

# Allowed actions by state.
ACTIONS: dict[str, tuple[Action, ...]] = {
    "queued": ("cancel", "pause"),
    "retrying": ("cancel", "pause"),
    "starting": ("cancel", "pause"),
    "running": ("cancel", "pause"),
    "pausing": ("cancel",),
    "paused": ("resume", "cancel"),
    "cancelling": (),
    "succeeded": ("delete",),
    "failed": ("retry", "delete"),
    "cancelled": ("retry", "delete"),
    "deleting": (),
    "deleted": (),
}

# Actions that are already in effect in each state; repeating them is a no-op.
_FULFILLED: dict[str, tuple[Action, ...]] = {
    "cancelled": ("cancel",),
    "cancelling": ("cancel",),
    "paused": ("pause",),
    "pausing": ("pause",),
    "deleting": ("delete",),
    "deleted": ("delete",),
}


class _StopTarget(NamedTuple):
    """Desired state for a stop request, and the states that the job passes through."""

    wanted: str
    while_saving: str
    stopped: str


_STOP_TARGETS: dict[Action, _StopTarget] = {
    "cancel": _StopTarget("cancel", "cancelling", "cancelled"),
    "pause": _StopTarget("pause", "pausing", "paused"),
}


def allowed_actions(job: Job) -> list[Action]:
    """Return the actions that the job's state allows.

    A run that was started outside the service can be cancelled only if it has an attempt, that is, if `ray job submit`
    started it.
    """
    if job.origin == "api":
        return list(ACTIONS[job.state])
    return ["cancel"] if job.state == "running" and job.attempt else []


def check_allowed(job: Job, action: Action) -> None:
    """Raise IllegalAction unless the job's state allows the action."""
    allowed = allowed_actions(job)
    if action not in allowed:
        outside = " and it was started outside the service" if job.origin != "api" else ""
        remedy = f"; allowed actions: {', '.join(allowed)}" if allowed else ""
        message = f"cannot {action} {job.id}: its state is {job.state}{outside}{remedy}"
        raise IllegalAction(message, allowed_actions=allowed)


def act(
    store: JobStore,
    job_id: str,
    project: str | None,
    action: Action,
    actor: str,
    deadline_s: float | None = None,
    clock: Callable[[], float] = time.time,
) -> Job:
    """Apply an action to a job. No-op if the action is already in effect. Raises IllegalAction or NotFound."""
    while True:
        job = store.get(job_id, project, deleted=action == "delete")
        if job.wanted == "preempt" and action == "pause" and job.state == "pausing":
            fields: dict[str, Any] = {"wanted": "pause"}  # it is already stopping, but must not return to the queue
        elif action in _FULFILLED.get(job.state, ()):
            return job
        else:
            check_allowed(job, action)
            fields = _fields(job, action, deadline_s, clock())
        try:
            return store.change(job, action, actor=actor, **fields)
        except StaleJob:
            continue


def _fields(job: Job, action: Action, deadline_s: float | None, now: float) -> dict[str, Any]:
    """Return the job fields that an action sets."""
    if action in ("resume", "retry"):
        restart = {"state": "queued", "wanted": "run", "retries": 0, "not_before": now, "stop_by": None}
        return {**restart, "reason": None, "message": "", "ended_at": None}
    if action == "delete":
        return {"wanted": "delete", "state": "deleting", "message": "removing its files"}
    target = _STOP_TARGETS[action]
    if job.state in ACTIVE:
        seconds = deadline_s if deadline_s is not None else checkpoint_deadline_s(job) + STOP_GRACE_S
        message = "saving a final checkpoint"
        return {"wanted": target.wanted, "state": target.while_saving, "stop_by": now + seconds, "message": message}
    fields: dict[str, Any] = {"wanted": target.wanted, "state": target.stopped, "message": ""}
    if target.stopped == "cancelled":
        fields |= {"reason": "cancelled_by_user", "ended_at": now}
    return fields


def checkpoint_deadline_s(job: Job) -> float:
    """Return the time that the job's config allows for a final checkpoint (`checkpoint.deadline_s`), in seconds."""
    run = job.config.get("train") if job.kind == "search" else job.config
    checkpoint = run.get("checkpoint") if isinstance(run, dict) else None
    return float((checkpoint or {}).get("deadline_s", CHECKPOINT_DEADLINE_S))
