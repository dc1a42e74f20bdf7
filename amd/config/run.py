"""Base config for all training runs: pre-training, fine-tuning and detection.

Subclasses add the model, the objective and their cross-field rules.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, model_validator

from amd.config.locations import StorageLocation
from amd.config.sections import ClipConfig, Section
from amd.config.training_sections import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    ScalingConfig,
    ScheduleConfig,
    TrackingConfig,
)

# Fields that do not affect the result of a run: they may change when the run resumes.
NOT_IN_DIGEST = ("storage", "name", "tracking", "checkpoint", "scaling", "probe", "media")

# Fields of `data` that change how samples are read but not their content: they may change when the run resumes.
READER_FIELDS = (
    "loader_workers",
    "prefetch_batches",
    "max_bad_fraction",
    "read_timeout_s",
    "read_memory_mib",
    "decoder",
    "damage",
    "min_decoded_share",
    "retries",
    "read_ahead_mib",
    "cache_dir",
    "cache_limit_mib",
)

# Defaults of fields added after version 0.1, keyed by section and name. A field at its default is not in the digest,
# so that runs from earlier versions can resume.
ADDED_FIELDS: dict[tuple[str, str], Any] = {
    ("encoder", "position_grid"): None,
    ("evaluation", "checkpoint"): "best",
    ("", "start"): None,
}


class RunConfig(Section):
    """Settings shared by all training runs: input, length, resources and storage."""

    clip: ClipConfig = ClipConfig()
    """Size, sampling and normalisation of the clips that the model receives."""
    data: DataConfig
    """Training data."""
    optim: OptimConfig = OptimConfig()
    """Optimizer settings."""
    schedule: ScheduleConfig
    """Length and learning rate schedule of the run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Schedule and retention of checkpoints."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers, devices and precision."""
    tracking: TrackingConfig = TrackingConfig()
    """Metric logging and the collapse guard."""
    storage: StorageLocation | None = None
    """Storage root for runs and encoders: a path or fsspec URL. Default: AMD_STORAGE, else the user's data folder."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")
    """ID of the run: letters, digits, - and _. Using the name and config of an earlier run resumes that run."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Random seed for weights, masks and data order."""

    @model_validator(mode="after")
    def _rules(self) -> RunConfig:
        if problems := self._problems():
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        """Return one line per broken cross-section rule; subclasses prepend their own lines."""
        batch, (low, high) = self.optim.batch_size, self.scaling.workers
        if high > batch:
            return [f"scaling.workers={high} must not be above optim.batch_size={batch}: every worker needs a sample"]
        if low == high and batch % high:
            return [f"optim.batch_size={batch} must be a multiple of scaling.workers={high}: workers split it evenly"]
        return []

    @property
    def clips_per_step(self) -> int:
        """Clips per optimizer step, across all workers."""
        return self.optim.batch_size * self.data.repeats

    @property
    def micro_batch(self) -> int:
        """Maximum number of samples per forward pass of a worker.

        If scaling.micro_batch is not set, this is each worker's share of the batch at the maximum number of workers.
        With fewer workers, an elastic run accumulates gradients rather than using more memory per worker.
        """
        return self.scaling.micro_batch or -(-self.optim.batch_size // self.scaling.workers[1])

    def digest(self) -> str:
        """Return the SHA-256 of the precision and of all fields except NOT_IN_DIGEST and READER_FIELDS."""
        values = self.model_dump(mode="json", exclude=set(NOT_IN_DIGEST))
        for field in READER_FIELDS:
            del values["data"][field]
        values["precision"] = self.scaling.precision
        _remove_added(values)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _remove_added(values: dict[str, Any], section: str = "") -> None:
    """Remove fields listed in ADDED_FIELDS whose value is the default."""
    for name, value in list(values.items()):
        if isinstance(value, dict):
            _remove_added(value, name)
        elif (section, name) in ADDED_FIELDS and value == ADDED_FIELDS[section, name]:
            del values[name]
