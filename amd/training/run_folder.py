"""A run's folder under the storage root, the spec for its workers, and its result. Imports neither torch nor Ray."""

from __future__ import annotations

import getpass
import os
import platform
import secrets
import socket
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from amd.config import ConfigError, ConfigLocation, RunConfig, ScalingConfig, listed, validate
from amd.config.locations import replace_locations
from amd.config.run import NOT_IN_DIGEST
from amd.storage import exists, is_remote, join, local_path, read_json, resolve_root, write_json

State = Literal["succeeded", "failed", "cancelled", "paused"]
C = TypeVar("C", bound=RunConfig)

CONFIG, FACTS, RESULT, BAD_SAMPLES = "config.json", "run.json", "result.json", "bad_samples.jsonl"
DAMAGED_SAMPLES = "damaged_samples.jsonl"
LEASE = "lease.json"


class TeacherTraining(BaseModel):
    """Training of a run's teacher from `teacher.preset`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_id: str
    """ID of the run that trained the teacher."""
    steps: int
    """Number of optimizer steps."""
    seconds: float
    """Wall time of the training, including checks and publishing; of its last part only if it was interrupted."""
    reused: bool
    """Whether another run had already trained the teacher, so that this run did not spend that time."""


class RunResult(BaseModel):
    """Result of a run: `result.json`, and the last line of `amd train --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    state: State
    reason: str | None = None
    """Reason why the run did not succeed, one of `failures.Reason`; null if it did."""
    message: str = ""
    run_id: str
    run_folder: str
    encoder_folder: str | None = None
    """Folder of the published encoder; set only if the run succeeded."""
    steps: int = 0
    """Number of completed optimizer steps."""
    seconds: float = 0.0
    """Wall time of this call, including checks and publishing."""
    figures: dict[str, float] = {}
    """Last logged metrics: losses, learning rate, speed."""
    restarts: dict[str, int] = {}
    """Number of restarts during this call, keyed by failure reason."""
    teacher: TeacherTraining | None = None
    """Training of the run's teacher; null unless `teacher.preset` is set."""

    @property
    def exit_code(self) -> int:
        return 0 if self.state == "succeeded" else 1


@dataclass(frozen=True)
class RunSpec:
    """Worker input as plain data, because the worker may start on another machine."""

    run_id: str
    root: str
    config: dict[str, Any]
    """Resolved config, in which `teacher.weights` is set and `teacher.preset` is not."""
    data_digest: str
    until: int | None = None
    """Step after which the run saves a checkpoint and pauses; None trains to the end."""
    parent: tuple[str, int] | None = None
    """Run and step of the checkpoint to start from if this run has no checkpoint; None starts from scratch."""

    def parsed(self, model: type[C]) -> C:
        """Parse the config as `model`, the Pydantic model for this kind of run."""
        return validate(model, self.config)

    @property
    def folder(self) -> str:
        return run_folder(self.root, self.run_id)

    def scaling(self) -> ScalingConfig:
        return validate(ScalingConfig, self.config["scaling"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spec_of(
    run_id: str,
    root: str,
    config: RunConfig,
    data_digest: str,
    until: int | None = None,
    parent: tuple[str, int] | None = None,
) -> RunSpec:
    """Build the spec for workers. Makes local paths absolute, because Ray workers run in other working directories."""
    values = replace_locations(type(config), config.model_dump(mode="json"), _absolute)
    values = validate(type(config), {**values, "storage": root}).model_dump(mode="json")
    return RunSpec(run_id, root, values, data_digest, until, parent)


def _absolute(location: ConfigLocation) -> str:
    """Make a local path absolute. Other locations and encoder names are returned unchanged."""
    value = location.value
    if is_remote(value) or value.startswith("demo:") or location.role == "tracking":
        return value
    path = local_path(value)
    return str(path) if location.role != "weights" or path.exists() else value


def run_folder(root: str, run_id: str) -> str:
    return join(root, "runs", run_id)


def find_run(name: str, storage: str | None = None) -> str:
    """Return a run's folder, given a path, a URL, or a run ID under the storage root."""
    is_path = is_remote(name) or "/" in name or local_path(name).exists()
    return name if is_path else run_folder(resolve_root(storage), name)


def new_run_id(kind: str = "train") -> str:
    return f"{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def open_run(
    root: str, run_id: str, config: RunConfig, *, kind: str, data: dict[str, Any], parent: str | None = None
) -> RunResult | None:
    """Create or reopen a run. Returns its result if it has already succeeded, else None.

    `data`: `digest` and `samples` of the data set. Writes config.json and run.json on creation. Raises ConfigError if
    a run with this name exists with a different config or different data.
    """
    folder = run_folder(root, run_id)
    if exists(join(folder, FACTS)):
        facts = read_json(join(folder, FACTS))
        _check_same(run_id, facts, read_json(join(folder, CONFIG)), config, data)
        if exists(join(folder, RESULT)):
            result = RunResult.model_validate(read_json(join(folder, RESULT)))
            if result.state == "succeeded":
                return result
        return None
    write_json(join(folder, CONFIG), config.model_dump(mode="json"))
    facts = {
        "id": run_id,
        "kind": kind,
        "parent": parent,
        "job": os.environ.get("AMD_JOB"),
        "project": os.environ.get("AMD_PROJECT"),
        "created": datetime.now(UTC).isoformat(),
        "digest": config.digest(),
        "data": data,
        "versions": versions(),
        "host": {"name": socket.gethostname(), "system": platform.platform(), "user": _user(), "cpus": os.cpu_count()},
        "command": sys.argv,
    }
    write_json(join(folder, FACTS), facts)
    return None


def is_of_this_job(root: str, run_id: str) -> bool:
    """Return whether the service job of this process created a run. False outside a job."""
    job = os.environ.get("AMD_JOB")
    return job is not None and read_json(join(run_folder(root, run_id), FACTS)).get("job") == job


def _check_same(
    run_id: str, facts: dict[str, Any], old: dict[str, Any], config: RunConfig, data: dict[str, Any]
) -> None:
    remedy = "choose another name, or undo the change to continue that run"
    if facts["digest"] != config.digest():
        fields = _differences(old, config.model_dump(mode="json"))
        changes = listed([f"{key} was {was!r}, now {now!r}" for key, was, now in fields], most=8)
        raise ConfigError([f"name={run_id}: a run with this name has a different config ({changes}); {remedy}"])
    if facts["data"]["digest"] != data["digest"]:
        was, now = facts["data"]["samples"], data["samples"]
        raise ConfigError(
            [f"name={run_id}: data.train has changed since the run started ({was} samples then, {now} now); {remedy}"]
        )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the dotted keys of the fields that differ, with the old and new values."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if was == now or (not prefix and key in NOT_IN_DIGEST):
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", was, now))
    return found


def versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that affect its results."""
    names = ("amd-service", "torch", "ray", "numpy", "decord", "av", "pillow", "timm")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None
