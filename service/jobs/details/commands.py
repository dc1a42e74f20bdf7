"""Commands that are equivalent to a job or a copy: `amd` submits it, `ray job submit` runs it outside the service."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from service.db.models import Job
from service.jobs.details.schemas import CloneRequest
from service.jobs.schemas import JobRequest

MAX_RUN_NAME = 100


def amd_command(request: JobRequest) -> str:
    """Return the `amd` command that submits the same job as a request with a preset."""
    preset = preset_arguments(str(request.preset), request.overrides)
    labels = _label_options(request.labels)
    options = _options(("name", request.name), *labels, ("priority", request.priority or None))
    return f"amd {request.kind} {preset} --submit{options}{_options(('project', request.project))}"


def clone_command(job: Job, changes: CloneRequest) -> str:
    """Return the `amd` command that submits a copy of a job with these changes."""
    command = f"amd jobs clone {job.id} {override_arguments(changes.overrides)}".rstrip()
    labels: Sequence[tuple[str, str]] = ()
    if changes.labels is not None and changes.labels != job.labels:
        labels = _label_options(changes.labels) or [("label", "")]
    return command + _options(("name", changes.name), *labels, ("priority", changes.priority))


def _label_options(labels: Mapping[str, str]) -> list[tuple[str, str]]:
    return [("label", f"{key}={value}") for key, value in labels.items()]


def _options(*options: tuple[str, object]) -> str:
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in options if value is not None)


def ray_command(request: JobRequest, root: str) -> str:
    """Return the `ray job submit` command that runs a training request with a preset under this storage root."""
    name = {"name": run_name(request.name)} if request.name and run_name(request.name) else {}
    values = {**request.overrides, **name, "storage": root}
    return f"ray job submit -- python -m amd.training {preset_arguments(str(request.preset), values)}"


def run_name(text: str) -> str:
    """Return a valid run ID that resembles a display name; empty if nothing of it can be kept."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-_")[:MAX_RUN_NAME].lower()


def preset_arguments(preset: str, overrides: Mapping[str, Any]) -> str:
    """Return the arguments of a command that starts from a preset, quoted for a shell."""
    return f"--preset {shlex.quote(preset)} {override_arguments(overrides)}".rstrip()


def override_arguments(overrides: Mapping[str, Any]) -> str:
    """Return overrides as arguments of a command, quoted for a shell."""
    return " ".join(shlex.quote(f"{key}={_plain(value)}") for key, value in overrides.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
