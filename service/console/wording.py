"""States, reasons and events of jobs in sentences, for people who do not know the service's vocabulary."""

from __future__ import annotations

from typing import Any

from service.jobs.schemas import EventView
from service.jobs.store import SERVICE

STATES: dict[str, str] = {
    "queued": "Waits in the queue",
    "starting": "Starts on the cluster",
    "running": "Runs",
    "retrying": "Waits to start again after a failure",
    "pausing": "Saves a checkpoint, then pauses",
    "paused": "Paused; resume it to continue from its newest checkpoint",
    "cancelling": "Saves a checkpoint, then ends",
    "succeeded": "Succeeded",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "deleting": "Its files are being removed",
    "deleted": "Deleted",
}

TONES: dict[str, str] = {
    "queued": "wait",
    "retrying": "wait",
    "starting": "busy",
    "running": "busy",
    "pausing": "wait",
    "paused": "idle",
    "cancelling": "wait",
    "succeeded": "good",
    "failed": "bad",
    "cancelled": "idle",
    "deleting": "idle",
    "deleted": "idle",
    "healthy": "good",
    "deploying": "busy",
    "unhealthy": "bad",
    "stopped": "idle",
    "waiting": "wait",
    "taken": "good",
    "given_up": "bad",
}
"""Colour of a state, which is never its only sign."""

REASONS: dict[str, str] = {
    "config_invalid": "The config breaks a rule. Clone the job and change the field that the message names.",
    "dataset_invalid": "The data cannot be used as described. See the bad samples and the message.",
    "teacher_load_failed": "The teacher's weights could not be loaded. Check teacher.weights.",
    "storage_unreachable": "The storage did not respond for too long. Retry continues from the newest checkpoint.",
    "infeasible_resources": "The cluster cannot offer what the job needs. Lower scaling.workers, or add nodes.",
    "cluster_unavailable": "The cluster did not respond. Retry once it is back.",
    "node_lost": "A node disappeared. Retry continues from the newest checkpoint.",
    "preempted_budget": "The nodes were taken away too often.",
    "oom_gpu": "A GPU ran out of memory. Lower scaling.micro_batch.",
    "oom_host": "A node ran out of memory. Lower data.workers or the batch size.",
    "nan_loss": "The loss became NaN or infinite. Lower optim.base_lr or raise the warm-up.",
    "stalled": "A worker made no progress for too long. Its stack traces are in the log.",
    "loader_crashed": "A data loader process died.",
    "time_limit": "The attempt reached its time limit. Retry continues from its checkpoint.",
    "deadline_exceeded": "The final checkpoint took longer than allowed, so the attempt was killed.",
    "cancelled_by_user": "Somebody cancelled it.",
    "user_code_error": "The program raised an error. See the end of the log.",
    "unknown": "No cause was reported. See the end of the log.",
}

ACTIONS: dict[str, str] = {
    "cancel": "Cancel",
    "pause": "Pause",
    "resume": "Resume",
    "retry": "Retry",
    "delete": "Delete",
}

CONFIRMATIONS: dict[str, str] = {
    "cancel": "Cancel this job? It saves a checkpoint first and can be retried from it.",
    "delete": "Delete this job with its log, metrics, checkpoints and output? Its encoders are kept.",
}

_EVENTS: dict[str, str] = {
    "created": "Submitted",
    "starting": "Attempt {attempt} submitted to the cluster",
    "running": "Running",
    "retrying": "Will start again",
    "queued": "Back in the queue",
    "pause": "Pause requested",
    "paused": "Paused",
    "resume": "Resume requested",
    "cancel": "Cancellation requested",
    "cancelled": "Cancelled",
    "retry": "Retry requested",
    "succeeded": "Succeeded",
    "failed": "Failed",
    "time_limit": "Time limit reached",
    "delete": "Deletion requested",
    "deleted": "Deleted",
    "edit": "Changed",
}


def event_title(event: EventView) -> str:
    """Return what happened, in a few words."""
    template = _EVENTS.get(event.type, event.type.replace("_", " ").capitalize())
    return template.replace("{attempt}", str(event.data.get("attempt", "")))


def event_details(event: EventView) -> list[str]:
    """Return the explanations of an event: its reason in words, its message, and what was changed."""
    lines = []
    reason, message = event.data.get("reason"), event.data.get("message")
    if reason:
        lines.append(REASONS.get(str(reason), str(reason)))
    if message:
        lines.append(str(message))
    if event.type == "edit":
        lines += [f"{name}: {value}" for name, value in event.data.items()]
    return lines


def actor(name: str) -> str:
    return "the service" if name == SERVICE else name


def tone(state: Any) -> str:
    return TONES.get(str(state), "idle")
