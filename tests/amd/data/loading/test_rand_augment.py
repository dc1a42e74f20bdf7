from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from amd.config import ClipConfig, ConfigError, DataConfig
from amd.data.loading.rand_augment import check_rand_augment, rand_augment
from amd.data.loading.transforms import augment

CLIP = ClipConfig(frames=4, size=32, patch=4)
K400, IN1K = "rand-m7-n4-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"


def still(frames: int = 4) -> Tensor:
    """A clip whose frames are all the same picture of smooth noise."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 6, 8), dtype=np.uint8)).float()
    picture = torch.nn.functional.interpolate(coarse, (36, 48), mode="bilinear")[0].permute(1, 2, 0)
    return picture.to(torch.uint8).expand(frames, -1, -1, -1).contiguous()


@pytest.mark.parametrize("words", [K400, IN1K])
def test_all_frames_get_the_same_operations(words: str) -> None:
    changed = 0
    for seed in range(20):
        out = rand_augment(still(), words, CLIP, random.Random(seed))
        assert out.shape == (4, 36, 48, 3)
        assert out.dtype == torch.uint8
        assert (out == out[:1]).all(), "a still clip stays still"
        changed += not torch.equal(out, still())
    assert changed > 15


def test_it_is_a_function_of_the_draws_alone() -> None:
    random.seed(1)
    first = rand_augment(still(), K400, CLIP, random.Random(5))
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(first, rand_augment(still(), K400, CLIP, random.Random(5)))
    assert not torch.equal(first, rand_augment(still(), K400, CLIP, random.Random(6)))


def test_the_global_streams_go_on_as_if_nothing_had_been_drawn() -> None:
    random.seed(3)
    np.random.seed(3)
    undisturbed = [random.random(), random.gauss(0, 1), np.random.rand()]
    random.seed(3)
    np.random.seed(3)
    rand_augment(still(), K400, CLIP, random.Random(0))
    assert [random.random(), random.gauss(0, 1), np.random.rand()] == undisturbed


def test_repeats_of_a_sample_are_augmented_differently() -> None:
    draws = random.Random(0)
    data = DataConfig(train="x", crop="center", rand_augment=K400)
    assert not torch.equal(augment(still(), data, CLIP, draws), augment(still(), data, CLIP, draws))


@pytest.mark.parametrize("words", ["rand-m7-q4", "augmix-m3", "original", ""])
def test_words_that_timm_does_not_take_are_the_users_mistake(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.rand_augment='.*not taken by timm.*write rand-m7"):
        check_rand_augment(words)


@pytest.mark.parametrize("words", [None, K400, IN1K])
def test_the_words_of_the_recipes_are_taken(words: str | None) -> None:
    check_rand_augment(words)
