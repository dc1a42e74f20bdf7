"""timm's RandAugment with the same operations and magnitudes in every frame of a clip, as in VideoMAE.

timm draws from the global generators of `random` and numpy. For every frame, both are seeded from the sample's
generator and restored afterwards, so that all frames match and the clip is a function of (seed, epoch, position).
Shapes: T frames, H height, W width.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amd.config import ClipConfig, ConfigError


def rand_augment(frames: Tensor, policy: str, clip: ClipConfig, draws: random.Random) -> Tensor:
    """Augment frames (T, H, W, 3) uint8 with a policy in timm's notation, such as rand-m7-n4-mstd0.5-inc1."""
    from PIL import Image

    transform, seed = _policy(policy, min(clip.size), clip.mean), draws.getrandbits(32)
    states = random.getstate(), np.random.get_state()
    out = torch.empty_like(frames)
    try:
        for frame, target in zip(frames, out, strict=True):
            random.seed(seed)
            np.random.seed(seed)
            target.copy_(torch.from_numpy(np.array(transform(Image.fromarray(frame.numpy())))))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return out


def check_rand_augment(policy: str | None) -> None:
    """Raise ConfigError if timm rejects the policy."""
    if policy is None:
        return
    try:
        _policy(policy, 224, (0.5, 0.5, 0.5))
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            [
                f"data.rand_augment={policy!r}: rejected by timm ({str(error) or type(error).__name__}); set "
                "it to a policy such as rand-m7-n4-mstd0.5-inc1, or to null"
            ]
        ) from None


@cache
def _policy(policy: str, side: int, mean: tuple[float, ...]) -> Any:
    from PIL import Image
    from timm.data import auto_augment  # slow import: torchvision takes seconds

    settings = {
        "translate_const": int(side * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = auto_augment.rand_augment_transform(policy, settings)
    for operation in transform.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """Keep the highest bits of every channel; 0 bits, which timm may draw but recent Pillow rejects, gives black."""
    return image.point([value & ~(255 >> bits) for value in range(256)] * len(image.getbands()))
