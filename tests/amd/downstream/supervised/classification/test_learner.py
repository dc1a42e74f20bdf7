from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from amd.config import AugmentConfig, FinetuneConfig
from amd.data.loading.loader import Batch
from amd.downstream.supervised.classification.learner import (
    EMA,
    BatchAugmentation,
    Finetuner,
    restore_classifier,
)
from amd.training.process_group import ProcessGroup
from tests.support.runs.finetuning import tiny_finetuning

CPU = torch.device("cpu")
OFF = {"mix_prob": 0.0, "erase_prob": 0.0, "label_smoothing": 0.0}


def augmented(
    clips: Tensor, targets: Tensor, classes: int = 5, seed: int = 0, **overrides: Any
) -> tuple[Tensor, Tensor]:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    multi_label = targets.ndim == 2
    return BatchAugmentation(AugmentConfig(**{**OFF, **overrides}), classes, multi_label, CPU)(clips.clone(), targets)


def test_erasing_removes_the_same_box_in_all_frames_and_colour_channels() -> None:
    clips, erased = torch.zeros(40, 3, 4, 16, 16), 0
    out, _ = augmented(clips, torch.zeros(40, dtype=torch.int64), erase_prob=0.5)
    for clip in out:
        box = clip != 0  # noise is never 0
        assert (box == box[0, 0]).all()
        if not box.any():
            continue
        erased += 1
        rows, columns = box[0, 0].any(dim=1).nonzero()[:, 0], box[0, 0].any(dim=0).nonzero()[:, 0]
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert box[0, 0].sum() == area, "the erased pixels form a rectangle"
        assert 0 < area / 256 < 0.4
        assert clip[:, 0].unique().numel() == 3 * area + 1, "noise, not one colour"
    assert 10 <= erased <= 30


@pytest.mark.parametrize("overrides", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {}])
def test_mixed_targets_match_the_fraction_of_pixels_from_each_sample(overrides: dict[str, float]) -> None:
    labels = torch.tensor([0, 1, 2, 3])
    clips = labels.float().reshape(4, 1, 1, 1, 1).expand(4, 3, 2, 16, 16)
    for seed in range(10):
        out, soft = augmented(clips, labels, seed=seed, mix_prob=1.0, **overrides)
        assert soft.shape == (4, 5)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
        shares = (soft * torch.arange(5)).sum(dim=1)  # each pixel holds the label of its original clip
        torch.testing.assert_close(out.mean(dim=(1, 2, 3, 4)), shares)
        assert (out == out[:, :1, :1]).all(), "one box, one weight for all frames and colours"


def test_unmixed_labels_are_smoothed_as_in_torch() -> None:
    labels = torch.tensor([0, 3])
    clips, logits = torch.rand(2, 3, 2, 8, 8), torch.randn(2, 5)
    out, soft = augmented(clips, labels, label_smoothing=0.1)
    assert torch.equal(out, clips)
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(functional.cross_entropy(logits, soft), expected)


def test_mixed_and_unmixed_labels_are_smoothed_in_the_same_way() -> None:
    labels, clips = torch.tensor([2, 2]), torch.zeros(2, 3, 1, 8, 8)
    _, mixed = augmented(clips, labels, mix_prob=1.0, label_smoothing=0.1)
    _, plain = augmented(clips, labels, label_smoothing=0.1)
    torch.testing.assert_close(mixed, plain)


def test_an_odd_batch_in_an_elastic_run_is_not_mixed() -> None:
    clips = torch.rand(3, 3, 1, 8, 8)
    out, soft = augmented(clips, torch.tensor([0, 1, 2]), mix_prob=1.0)
    assert torch.equal(out, clips)
    assert torch.equal(soft, torch.eye(5)[:3])


def test_multi_label_targets_are_neither_mixed_nor_smoothed() -> None:
    truth = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    _, soft = augmented(torch.rand(2, 3, 1, 8, 8), truth, label_smoothing=0.1)
    assert torch.equal(soft, truth.float())


# Whole training steps


def batch_of(config: FinetuneConfig, clips: int = 8, seed: int = 0) -> Batch:
    pixels = torch.randint(
        0, 256, (clips, 3, config.clip.frames, *config.clip.size), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    numbers = torch.arange(clips)
    return Batch(pixels, numbers % 2, numbers, [])


def new_learner(config: FinetuneConfig, rank: int = 0) -> Finetuner:
    group = ProcessGroup()
    group.rank = rank
    return Finetuner(config, group, lambda classifier: None, lambda batch: batch.labels)


def loss(config: FinetuneConfig, step: int, rank: int = 0) -> float:
    learner = new_learner(config, rank)
    learner.begin(step)
    batch = batch_of(config)
    return learner.loss(batch.clips, batch, 0)[0].item()


def test_augmentation_and_drop_path_depend_only_on_seed_step_and_rank(tmp_path: Path) -> None:
    config = tiny_finetuning(tmp_path)
    first = loss(config, step=3)
    random.seed(9)
    torch.manual_seed(9)
    assert loss(config, step=3) == first
    other_seed = tiny_finetuning(tmp_path, seed=1)
    assert len({first, loss(config, step=4), loss(config, step=3, rank=1), loss(other_seed, step=3)}) == 4


@pytest.mark.parametrize(
    "encoder",
    [{}, {"class_token": True, "positions": "sincos_2d"}, {"positions": "learned"}, {"depth": 1}],
    ids=["plain", "class token", "learned positions", "one block"],
)
def test_every_parameter_receives_a_gradient(tmp_path: Path, encoder: dict[str, Any]) -> None:
    overrides = {f"encoder__{key}": value for key, value in encoder.items()}
    learner = new_learner(tiny_finetuning(tmp_path, encoder__drop_path=0.0, **overrides))
    learner.accumulate(1, [batch_of(learner.config)])
    without = [name for name, value in learner.network.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def test_micro_batches_yield_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    config = tiny_finetuning(tmp_path, augment__mix_prob=0, augment__erase_prob=0, encoder__drop_path=0)
    whole, parts = new_learner(config), new_learner(config)
    batch = batch_of(config)
    whole.accumulate(0, [batch])
    parts.accumulate(0, [Batch(*(value[rows] for value in batch[:3]), []) for rows in (slice(0, 6), slice(6, 8))])
    for ours, theirs in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_the_moving_average_is_used_for_testing_and_restored_from_a_checkpoint(tmp_path: Path) -> None:
    config = tiny_finetuning(tmp_path, optim__ema_decay=0.9)
    learner = new_learner(config)
    expected: dict[str, Tensor] = {}
    for step in range(3):
        learner.learn(step, [batch_of(config, seed=step)], lr=0.01)
        now = learner.network.state_dict()
        expected = {
            name: 0.9 * expected[name] + 0.1 * value if expected else value.clone() for name, value in now.items()
        }
    assert learner.tested is not learner.network
    torch.testing.assert_close(dict(learner.tested.state_dict()), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(learner.tested.head.weight, learner.network.head.weight)

    resumed = new_learner(config)
    resumed.load_extra_state(learner.extra_state())
    loaded = restore_classifier(config, {"model": dict(learner.network.state_dict()), **learner.extra_state()})
    for other in (resumed.tested, loaded):
        torch.testing.assert_close(dict(other.state_dict()), dict(learner.tested.state_dict()), rtol=0, atol=0)


def test_the_trained_weights_are_used_for_testing_if_there_is_no_moving_average(tmp_path: Path) -> None:
    learner = new_learner(tiny_finetuning(tmp_path))
    assert learner.tested is learner.network
    assert EMA not in learner.extra_state()
