"""Find a stack's processes by role, and the job that a training process belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import psutil

Role = Literal[
    "control plane", "raylet", "gcs", "dashboard", "driver", "program", "controller", "worker", "decoder", "replica"
]
ROLES: tuple[Role, ...] = get_args(Role)
JOB = "AMD_JOB"  # in the environment of a job's processes, except those that Ray renames


def _is_module(name: str) -> Callable[[list[str]], bool]:
    """Match `python … -m NAME …`, but not a shell that starts it."""
    return lambda command: "python" in command[0] and "-m" in command and command[command.index("-m") + 1] == name


def _is_actor(name: str) -> Callable[[list[str]], bool]:
    return lambda command: command[0].startswith("ray::") and name in command[0]


# How the command line identifies a role.
MATCHES: dict[Role, Callable[[list[str]], bool]] = {
    "control plane": _is_module("service"),
    "raylet": lambda command: command[0].endswith("/raylet/raylet"),
    "gcs": lambda command: command[0].endswith("/gcs_server"),
    "dashboard": lambda command: any(part.endswith("/dashboard/dashboard.py") for part in command[:3]),
    "driver": _is_module("service.jobs.runner"),
    "program": _is_module("amd.training"),
    "controller": _is_actor("TrainController"),
    "worker": _is_actor("RayTrainWorker"),
    "decoder": _is_module("amd.data.decoding.worker"),
    "replica": _is_actor("ServeReplica"),
}
assert MATCHES.keys() == set(ROLES)


def with_role(role: Role, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return the processes with a role, sorted by PID. Includes the decoders of jobs but not of replicas."""
    found = [process for process in processes if has_role(role, process)]
    if role == "decoder":
        found = [process for process in found if job_of(process)]
    return sorted(found, key=lambda process: process.pid)


def has_role(role: Role, process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
        return bool(command) and process.status() != psutil.STATUS_ZOMBIE and MATCHES[role](command)
    except (psutil.Error, IndexError):
        return False


def job_of(process: psutil.Process) -> str | None:
    """Return the job ID in a process's environment. Return None if it is not set or the environment cannot be read."""
    try:
        job: str | None = process.environ().get(JOB)
    except (psutil.Error, OSError):
        return None
    return job


def training_worker_of(decoder: psutil.Process) -> psutil.Process | None:
    """Return the running training worker that started a decoder, or None."""
    try:
        return next((parent for parent in decoder.parents() if has_role("worker", parent)), None)
    except psutil.Error:
        return None
