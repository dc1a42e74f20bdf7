"""Plain-language names of job states, failure reasons, events and pictures, for users who are new to the service."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from amd.training.reporting.media_files import PictureName
from service.jobs.schemas import EventView
from service.jobs.store import SERVICE
from service.projects.schemas import ActivityView
from service.registry.schemas import FigureName
from service.web.errors import Problem
from service.web.formats import number, percent

STATES: dict[str, str] = {
    "queued": "Waiting in the queue",
    "starting": "Starting on the cluster",
    "running": "Running",
    "retrying": "Waiting to restart after a failure",
    "pausing": "Saving a checkpoint before pausing",
    "paused": "Paused; resume it to continue from its newest checkpoint",
    "cancelling": "Saving a checkpoint before stopping",
    "succeeded": "Succeeded",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "deleting": "Files are being removed",
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
    "alive": "good",
    "lost": "bad",
    "healthy": "good",
    "deploying": "busy",
    "unhealthy": "bad",
    "stopped": "idle",
    "waiting": "wait",
    "taken": "good",
    "given_up": "bad",
}
"""Colour of each state. Pages always show the state as text, too."""

REASONS: dict[str, str] = {
    "config_invalid": "The config is invalid. Clone the job and change the field named in the message.",
    "dataset_invalid": "The data cannot be used with this config. See the bad samples and the message.",
    "teacher_load_failed": "The teacher's weights could not be loaded. Check teacher.weights.",
    "storage_unreachable": "The storage did not respond for too long. Retry continues from the newest checkpoint.",
    "infeasible_resources": "The cluster lacks resources that the job needs. Lower scaling.workers, or add nodes.",
    "cluster_unavailable": "The cluster did not respond. Retry once it is back.",
    "node_lost": "A node disappeared. Retry continues from the newest checkpoint.",
    "preempted_budget": "The nodes were preempted too often.",
    "oom_gpu": "A GPU ran out of memory. Lower scaling.micro_batch.",
    "oom_host": "A node ran out of memory. Lower data.loader_workers or the batch size.",
    "nan_loss": "The loss became NaN or infinite. Lower optim.base_lr or raise the warm-up.",
    "stalled": "A worker made no progress for too long. Its stack traces are in the log.",
    "loader_crashed": "A data loader process died.",
    "time_limit": "The attempt reached its time limit. Retry continues from its checkpoint.",
    "deadline_exceeded": "The final checkpoint took longer than allowed, so the attempt was killed.",
    "cancelled_by_user": "A user cancelled the job.",
    "user_code_error": "The program raised an error. See the end of the log.",
    "unknown": "No cause was reported. See the end of the log.",
}

PICTURES: dict[PictureName, str] = {
    "input.webp": "Input",
    "student.webp": "Student's view",
    "rebuilt.webp": "Rebuilt",
}

FIGURES: dict[FigureName, str] = {
    "parameters": "Parameters",
    "width": "Width",
    "depth": "Depth",
    "flops_per_clip": "FLOPs per clip",
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

_PROBLEMS: dict[int, str] = {
    HTTPStatus.BAD_REQUEST: "Invalid input",
    HTTPStatus.UNPROCESSABLE_ENTITY: "Invalid input",
    HTTPStatus.FORBIDDEN: "Not allowed",
    HTTPStatus.NOT_FOUND: "Not found",
    HTTPStatus.CONFLICT: "Not possible",
    HTTPStatus.PRECONDITION_FAILED: "Not possible",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "Too large",
    HTTPStatus.TOO_MANY_REQUESTS: "Too many requests",
    HTTPStatus.SERVICE_UNAVAILABLE: "Not available now",
    HTTPStatus.INTERNAL_SERVER_ERROR: "Internal error",
}
"""Titles of problems by HTTP status."""

_EVENTS: dict[str, str] = {
    "created": "Submitted",
    "starting": "Attempt {attempt} submitted to the cluster",
    "running": "Running",
    "retrying": "Restart scheduled",
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
    "stop_trial": "Stop requested for trial {trial}",
}


_CHANGES: dict[str, str] = {
    "alias.move": "Alias moved to {outcome}",
    "alias.delete": "Alias deleted",
    "deployment.put": "Deployment {outcome}",
    "deployment.delete": "Deployment deleted",
    "encoder.delete": "Encoder deleted",
}


def problem_title(problem: Problem) -> str:
    """Return the title of a problem in plain words."""
    if problem.code == "not_possible":
        return "Not possible"
    return _PROBLEMS.get(problem.status, problem.title)


def event_title(event: EventView) -> str:
    """Return a short title for an event."""
    return _job_event_title(event.type, event.data)


def activity_title(event: ActivityView) -> str:
    """Return a short title for a job event, or for a change to another object."""
    if event.type in _CHANGES:
        return _CHANGES[event.type].replace("{outcome}", str(event.data.get("outcome", "")))
    return _job_event_title(event.type.removeprefix("job."), event.data)


def _job_event_title(type: str, data: Mapping[str, Any]) -> str:
    template = _EVENTS.get(type, type.replace("_", " ").capitalize())
    for name in ("attempt", "trial"):
        template = template.replace(f"{{{name}}}", str(data.get(name, "")))
    return template


def event_details(event: EventView | ActivityView) -> list[str]:
    """Return an event's details: a description of its reason, its message, and any changed fields."""
    lines = []
    reason, message = event.data.get("reason"), event.data.get("message")
    if reason:
        lines.append(REASONS.get(str(reason), str(reason)))
    if message:
        lines.append(str(message))
    if event.type in ("edit", "job.edit"):
        lines += [f"{name}: {value}" for name, value in event.data.items()]
    return lines


def actor(name: str) -> str:
    return "the service" if name == SERVICE else name


def score(metric: str, value: float | None, digits: int = 2) -> str:
    """Format an evaluation metric. All are percentages, except for a loss and a number of samples."""
    if value is None or metric in ("eval/loss", "eval/unreadable"):
        return number(value)
    return percent(value / 100, digits)


def tone(state: Any) -> str:
    return TONES.get(str(state), "idle")
