"""RandAugment by timm, the same operations with the same strengths in every frame of a clip, as VideoMAE has it.

timm draws from the global generators of `random` and numpy. They are set from the sample's own draws for every frame,
which is what makes the frames agree and a sample's clip a function of (seed, epoch, position), and put back afterwards.
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


def rand_augment(frames: Tensor, words: str, clip: ClipConfig, draws: random.Random) -> Tensor:
    """(T, H, W, 3) uint8 -> the same shape. `words`: timm's, such as rand-m7-n4-mstd0.5-inc1."""
    from PIL import Image

    policy, seed = _policy(words, min(clip.size), clip.mean), draws.getrandbits(32)
    before = random.getstate(), np.random.get_state()
    out = torch.empty_like(frames)
    try:
        for frame, target in zip(frames, out, strict=True):
            random.seed(seed)
            np.random.seed(seed)
            target.copy_(torch.from_numpy(np.array(policy(Image.fromarray(frame.numpy())))))
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
    return out


def check_rand_augment(words: str | None) -> None:
    """Raises ConfigError for words that timm does not take."""
    if words is None:
        return
    try:
        _policy(words, 224, (0.5, 0.5, 0.5))
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            [
                f"data.rand_augment={words!r}: not taken by timm ({str(error) or type(error).__name__}); write "
                "rand-m7-n4-mstd0.5-inc1, or null"
            ]
        ) from None


@cache
def _policy(words: str, side: int, mean: tuple[float, ...]) -> Any:
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform  # takes seconds: torchvision

    settings = {
        "translate_const": int(side * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    return rand_augment_transform(words, settings)
