"""What every kind of run has in common: pre-training, fine-tuning, detection. Subclasses add what they train."""

from __future__ import annotations

import hashlib
import json

from pydantic import Field, model_validator

from amd.config.sections import (
    CheckpointConfig,
    ClipConfig,
    DataConfig,
    OptimConfig,
    ScalingConfig,
    ScheduleConfig,
    Section,
    TrackingConfig,
)

READING_MEANS = (
    "loader_workers",
    "prefetch_batches",
    "max_bad_fraction",
    "read_timeout_s",
    "read_memory_mib",
    "decoder",
    "retries",
    "cache_dir",
    "cache_limit_mib",
)  # how data is read, not what: they may change when a run continues


class RunConfig(Section):
    """A run on a data set: what is fed, how long, on which machines, and where it is kept."""

    clip: ClipConfig = ClipConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: str | None = None
    """Root of runs and encoders, any fsspec URL; none: the environment's AMD_STORAGE, else the user's data folder."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")
    """The run's id: letters, digits, - and _. The same name with the same config continues the run."""
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _rules(self) -> RunConfig:
        if problems := self._problems():
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        """One line for every rule between sections that is broken; subclasses put theirs before these."""
        batch, (least, most) = self.optim.batch_size, self.scaling.workers
        if most > batch:
            return [f"scaling.workers={most} must not be above optim.batch_size={batch}: every worker takes a sample"]
        if least == most and batch % most:
            return [f"optim.batch_size={batch} must be a multiple of scaling.workers={most}: workers share it evenly"]
        return []

    @property
    def clips_per_step(self) -> int:
        return self.optim.batch_size * self.data.repeats

    def digest(self) -> str:
        """sha256 of what decides the result: not where it is kept, how it is watched, or what it is called."""
        watched = {"storage", "name", "tracking", "checkpoint", "scaling", "probe"}
        decides = self.model_dump(mode="json", exclude=watched)
        for means in READING_MEANS:
            del decides["data"][means]
        decides["precision"] = self.scaling.precision
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
