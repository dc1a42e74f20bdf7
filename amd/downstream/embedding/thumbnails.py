"""Thumbnails of samples: the clip that the encoder sees, as a small WebP image.

An image becomes one picture; a clip becomes a strip of evenly spaced frames. Encoding happens in the loader processes,
where samples are decoded, so the encoder does not wait for it.
Shapes: T frames, H height, W width.
"""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amd.config import ClipConfig, DataConfig
from amd.data.loading import transforms
from amd.downstream.embedding.map_files import THUMBNAIL_FORMAT

SIDE = 64  # longest side of a frame, in pixels
STRIP_FRAMES = 4
QUALITY = 75


class ThumbnailTransform:
    """A ClipTransform that crops as in evaluation and returns the clip's thumbnail as the extra value."""

    def __init__(self, data: DataConfig, clip: ClipConfig) -> None:
        self._data, self._clip = data, clip

    def __call__(self, frames: Tensor, record: Any, draws: random.Random) -> tuple[Tensor, bytes]:
        clip = transforms.center(frames, self._data, self._clip)
        return clip, encode_thumbnail(clip)


def encode_thumbnail(clip: Tensor) -> bytes:
    """Encode frames (T, H, W, 3) uint8 as a WebP image. Frames are never enlarged."""
    from PIL import Image  # probes, which import this module, work without it

    pictures = [Image.fromarray(frame.numpy()) for frame in _strip(clip)]
    for picture in pictures:
        picture.thumbnail((SIDE, SIDE))
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * width, 0))
    file = io.BytesIO()
    strip.save(file, THUMBNAIL_FORMAT, quality=QUALITY)
    return file.getvalue()


def _strip(clip: Tensor) -> list[Tensor]:
    """Return evenly spaced frames of a clip, or a single frame if they are all equal, as for an image."""
    numbers = np.linspace(0, len(clip) - 1, min(STRIP_FRAMES, len(clip))).round().astype(int).tolist()
    frames = [clip[number] for number in numbers]
    return frames[:1] if all(torch.equal(frame, frames[0]) for frame in frames) else frames
