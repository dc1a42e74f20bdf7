"""The `Preset` type: a named config with its source and estimated cost, for any kind of run. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from amd.config import RunConfig, TrainConfig
from amd.flops import step_flops

UNSET = "unset:"  # prefix of values that the user must set
H100_BF16_FLOPS = 989.5e12  # data sheet, dense
ASSUMED_MFU = 0.4  # model FLOPs utilisation assumed for estimated hours

# Loader processes per GPU, and CPUs for them and the training process: 88 CPUs for 8 GPUs. Our default.
GPU_READERS = {"loader_workers": 10}
GPU_CPUS = {"cpus_per_worker": 11}

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A named config with its source and cost."""

    name: str
    summary: str
    source: str
    """Source of the values: a paper and its code, or "our default"."""
    hardware: str
    config: C
    samples: int | None = None
    """Number of samples in a pre-training recipe's data set."""

    @property
    def gpu_hours(self) -> float | None:
        """Estimated H100-hours of pre-training at 40% of peak bf16 throughput (computed from FLOPs, not measured)."""
        config = self.config
        if self.samples is None or config.schedule.epochs is None or not isinstance(config, TrainConfig):
            return None
        clips = self.samples * config.schedule.epochs * config.data.repeats
        return clips * step_flops(config).total / (ASSUMED_MFU * H100_BF16_FLOPS) / 3600
