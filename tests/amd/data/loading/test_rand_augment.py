"""RandAugment is consistent across frames and depends only on the sample's generator."""

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
    """Return a clip whose frames all show the same smooth noise."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 6, 8), dtype=np.uint8)).float()
    picture = torch.nn.functional.interpolate(coarse, (36, 48), mode="bilinear")[0].permute(1, 2, 0)
    return picture.to(torch.uint8).expand(frames, -1, -1, -1).contiguous()


@pytest.mark.parametrize("policy", [K400, IN1K])
def test_all_frames_get_the_same_operations(policy: str) -> None:
    changed = 0
    for seed in range(20):
        out = rand_augment(still(), policy, CLIP, random.Random(seed))
        assert out.shape == (4, 36, 48, 3)
        assert out.dtype == torch.uint8
        assert (out == out[:1]).all(), "the frames of a still clip must stay identical"
        changed += not torch.equal(out, still())
    assert changed > 15


def test_the_result_depends_only_on_the_generator() -> None:
    random.seed(1)
    first = rand_augment(still(), K400, CLIP, random.Random(5))
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(first, rand_augment(still(), K400, CLIP, random.Random(5)))
    assert not torch.equal(first, rand_augment(still(), K400, CLIP, random.Random(6)))


def test_the_global_generators_are_restored() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = [random.random(), random.gauss(0, 1), np.random.rand()]
    random.seed(3)
    np.random.seed(3)
    rand_augment(still(), K400, CLIP, random.Random(0))
    assert [random.random(), random.gauss(0, 1), np.random.rand()] == expected


def test_repeats_of_a_sample_are_augmented_differently() -> None:
    draws = random.Random(0)
    data = DataConfig(train="x", crop="center", rand_augment=K400)
    assert not torch.equal(augment(still(), data, CLIP, draws), augment(still(), data, CLIP, draws))


@pytest.mark.parametrize("magnitude", range(11))
@pytest.mark.parametrize("increasing", ["", "-inc1"])
def test_every_magnitude_of_every_operation_can_be_applied(magnitude: int, increasing: str) -> None:
    frames = still(1)
    for seed in range(40):  # each draws one of 15 operations
        rand_augment(frames, f"rand-m{magnitude}-n1-p1.0{increasing}", CLIP, random.Random(seed))


@pytest.mark.parametrize("policy", ["rand-m7-q4", "augmix-m3", "original", ""])
def test_a_policy_that_timm_rejects_is_a_config_error(policy: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.rand_augment='.*rejected by timm.*set it to a policy"):
        check_rand_augment(policy)


@pytest.mark.parametrize("policy", [None, K400, IN1K])
def test_the_policies_used_in_presets_are_accepted(policy: str | None) -> None:
    check_rand_augment(policy)


IMAGE = ClipConfig(frames=1, size=32, patch=8, tubelet=1)


def timm_training_images(frame: Tensor, policy: str, seeds: list[int]) -> list[Tensor]:
    """Augment a square image with timm, flipped but not cropped. Returns one result per RandAugment seed."""
    timm_data = pytest.importorskip("timm.data")
    from PIL import Image

    transform = timm_data.create_transform(
        IMAGE.size[0],
        is_training=True,
        auto_augment=policy,
        interpolation="bicubic",
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        hflip=1.0,
        mean=IMAGE.mean,
        std=IMAGE.std,
        normalize=False,
        use_prefetcher=True,  # ends with uint8 pixels
    )
    results = []
    for seed in seeds:
        picture = Image.fromarray(frame.numpy())
        for part in transform.transforms:
            random.seed(seed)
            np.random.seed(seed)
            picture = part(picture)
        results.append(torch.as_tensor(picture).permute(1, 2, 0))
    return results


class FixedSeed(random.Random):
    """A generator that always flips and uses a known seed for RandAugment."""

    def __init__(self, seed: int) -> None:
        super().__init__(0)
        self.augment_seed = seed

    def getrandbits(self, bits: int, /) -> int:
        return self.augment_seed if bits == 32 else super().getrandbits(bits)

    def random(self) -> float:
        return 0.0


@pytest.mark.parametrize("policy", ["rand-m9-mstd0-inc1", "rand-m7-n4-mstd0.5-inc1"])
def test_an_image_is_augmented_after_crop_and_flip_as_in_timm(policy: str) -> None:
    coarse = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 3, 5, 5), dtype=np.uint8)).float()
    frame = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0).byte()
    data = DataConfig(train="x", crop="center", interpolation="bicubic", flip=True, rand_augment=policy)
    seeds = list(range(40))
    theirs = timm_training_images(frame.contiguous(), policy, seeds)
    for seed, expected in zip(seeds, theirs, strict=True):
        (ours,) = augment(frame[None].contiguous(), data, IMAGE, FixedSeed(seed))
        assert torch.equal(ours, expected), f"seed {seed}"


def test_the_frames_of_a_video_are_augmented_before_the_crop_as_in_videomae() -> None:
    frames, draws = still(), random.Random(7)
    data = DataConfig(train="x", crop="center", rand_augment=K400)
    ours = augment(frames, data, CLIP, random.Random(7))
    augmented = rand_augment(frames, K400, CLIP, draws)
    plain = data.model_copy(update={"rand_augment": None})
    assert torch.equal(ours, augment(augmented, plain, CLIP, draws))
