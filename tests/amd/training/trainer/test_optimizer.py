from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from amd.config import EncoderConfig, OptimConfig, TokenGrid
from amd.models.classifier import Classifier
from amd.models.student import Student
from amd.training.trainer.optimizer import (
    build_optimizer,
    clip_gradients,
    cosine_lr,
    is_decayed,
    layer_scale,
    parameter_groups,
    set_lr,
)
from tests.support.runs.configs import tiny_image_config, tiny_video_config


def test_the_schedule_matches_the_official_one(golden: Path) -> None:
    for case in json.loads((golden / "cosine_scheduler.json").read_text())["cases"]:
        args, values = case["args"], case["values"]
        warmup = args["warmup_steps"] if args["warmup_steps"] > 0 else args["warmup_epochs"] * args["niter_per_ep"]
        ours = [
            cosine_lr(
                step,
                peak=args["base_value"],
                final=args["final_value"],
                steps=len(values),
                warmup=warmup,
                start=args["start_warmup_value"],
            )
            for step in range(len(values))
        ]
        assert ours == pytest.approx(values, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    ("step", "lr"), [(0, 0.0), (1, 5.118e-7), (4689, 2.4e-3), (4690, 2.4e-3), (46_900, 1.30827e-3), (93_799, 2.0e-5)]
)
def test_the_k400_recipe_has_the_expected_learning_rates(step: int, lr: float) -> None:
    assert cosine_lr(step, peak=2.4e-3, final=2e-5, steps=93_800, warmup=4690) == pytest.approx(lr, rel=1e-4)


def test_a_short_schedule_warms_up_and_stays_at_the_final_rate() -> None:
    rates = [cosine_lr(step, peak=1.0, final=0.1, steps=5, warmup=2) for step in range(8)]
    assert rates[:2] == [0.0, 1.0]
    assert rates[5:] == pytest.approx([0.1] * 3)


def test_weight_decay_applies_to_the_same_parameters_as_in_the_official_groups(golden: Path) -> None:
    groups = json.loads((golden / "param_groups.json").read_text())
    for group in groups["pretrain_depth2_dec1_gen1"]:
        for name in group["names"]:
            one_dimensional = name.endswith((".bias", "_bias")) or ".norm" in name
            shape = (1, 1, 4) if name.endswith("mask_token") else (4,) if one_dimensional else (4, 4)
            assert is_decayed(name, torch.zeros(shape)) == (group["weight_decay"] > 0), name


@pytest.mark.parametrize("config", [tiny_video_config(), tiny_image_config()], ids=["video", "image"])
def test_every_parameter_is_in_one_group_and_tokens_are_not_decayed(config) -> None:
    student = Student(config)
    undecayed, decayed = parameter_groups(student, 0.05)
    names = [*undecayed["names"], *decayed["names"]]
    assert sorted(names) == sorted(name for name, _ in student.named_parameters())
    assert not [name for name in decayed["names"] if name.endswith(("token", "bias"))]
    assert "generators.0.mask_token" in undecayed["names"]
    assert "projections.0.weight" in decayed["names"]


def test_clipping_scales_to_the_limit_and_returns_the_original_norm() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert clip_gradients([weight], 1.0).item() == pytest.approx(5.0)
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert clip_gradients([weight], None).item() == pytest.approx(1.0, rel=1e-4)


def test_the_optimizer_uses_the_scaled_learning_rate_and_is_fused() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimConfig(batch_size=512, base_lr=1e-3))
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}
    assert optimizer.defaults["fused"] is True


def test_layer_decay_has_the_expected_scales() -> None:
    names = ["encoder.patch_embed.weight", *(f"encoder.blocks.{i}.mlp.fc1.weight" for i in range(12)), "head.weight"]
    scales = [layer_scale(name, depth=12, decay=0.75) for name in names]
    expected = "023757 031676 042235 056314 075085 100113 133484 177979 237305 316406 421875 5625 75"
    assert scales == pytest.approx([*(float(f"0.{digits}") for digits in expected.split()), 1.0], abs=5e-7)
    assert layer_scale("encoder.class_token", 12, 0.75) == layer_scale("encoder.positions", 12, 0.75) == scales[0]
    assert layer_scale("encoder.norm.weight", 12, 0.75) == 1.0


@pytest.mark.parametrize(
    ("case", "decay"), [("finetune_depth3_layer_decay_0p75", 0.75), ("finetune_depth3_no_layer_decay", 1.0)]
)
def test_the_parameter_groups_of_a_classifier_match_the_official_ones(golden: Path, case: str, decay: float) -> None:
    groups = json.loads((golden / "param_groups.json").read_text())[case]
    official = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    config = EncoderConfig(width=24, depth=3, heads=3)
    classifier = Classifier(config, TokenGrid(2, 4, 4), 96, classes=7)
    ours = {
        _official_name(name): (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(classifier, 0.05, lambda name: layer_scale(name, 3, decay))
        for name in group["names"]  # type: ignore[attr-defined]
    }
    assert ours == official


def _official_name(name: str) -> str:
    bare = name.removeprefix("encoder.")
    return bare.replace("patch_embed.", "patch_embed.proj.").replace("norm.", "fc_norm.", not bare.startswith("blocks"))


def test_the_learning_rate_of_a_group_is_the_scheduled_rate_times_its_scale() -> None:
    classifier = Classifier(EncoderConfig(width=12, depth=2, heads=3), TokenGrid(1, 2, 2), 12, classes=2)
    optimizer = build_optimizer(classifier, OptimConfig(), lambda name: layer_scale(name, 2, 0.5))
    set_lr(optimizer, 0.1)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {0.1 * 0.5**power for power in range(4)}
