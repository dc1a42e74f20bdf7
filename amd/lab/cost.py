"""Cost of mask settings: FLOPs of a training step, in total and relative to other settings. Torch-free."""

from __future__ import annotations

from typing import NamedTuple

from amd.config import TrainConfig
from amd.flops import StepFlops, step_flops


class StepCost(NamedTuple):
    """FLOPs of a training step per clip, for a config and for its baseline."""

    flops: StepFlops
    baseline: StepFlops

    @property
    def relative(self) -> float:
        """FLOPs as a multiple of the baseline's."""
        return self.flops.total / self.baseline.total


def compare_cost(config: TrainConfig, baseline: TrainConfig) -> StepCost:
    """Compare the FLOPs of a config with a baseline, such as its preset with unchanged mask ratios."""
    return StepCost(step_flops(config), step_flops(baseline))
