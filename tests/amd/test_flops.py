from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from amd.config import TrainConfig, with_overrides
from amd.flops import step_flops
from amd.presets.pretraining import PRESETS
from tests.amd.test_distillation import OBJECTIVES, batch, networks, run


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_formula_matches_the_torch_flop_counter(name: str) -> None:
    config = OBJECTIVES[name]
    student, teacher = networks(config)
    # The math backend computes attention as matrix products, which the counter counts in both passes on any device.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(config, student, teacher, batch(config, 2)).total.backward()
    assert counter.get_total_flops() / 2 == pytest.approx(step_flops(config).total, rel=1e-6)


@pytest.mark.parametrize(("name", "gflops"), [("k400-vit-b", 558.6), ("k400-vit-s", 421.2)])
def test_the_flops_of_the_papers_training_step_match_a_manual_calculation(name: str, gflops: float) -> None:
    assert step_flops(PRESETS[name].config).total / 1e9 == pytest.approx(gflops, abs=0.05)


def test_a_teacher_that_sees_more_tokens_needs_more_flops() -> None:
    def teacher(config: TrainConfig, ratio: float) -> float:
        return step_flops(with_overrides(config, {"mask.teacher_ratio": ratio})).teacher

    config = PRESETS["k400-vit-b"].config
    assert teacher(config, 0.0) > teacher(config, 0.5) > teacher(config, 0.75) > teacher(config, 0.9)
