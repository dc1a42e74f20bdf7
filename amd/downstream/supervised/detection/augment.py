"""Augment decoded frames together with their boxes: every geometric transform applies to both.

Frames stay uint8; randomness is passed in.
Shapes: T frames, H height, W width, n boxes.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amd.config import ClipConfig, DetectionDataConfig, Interpolation
from amd.data.loading.transforms import Box, Size, mirror, resize_box
from amd.downstream.supervised.detection import boxes as box
from amd.downstream.supervised.detection.boxes import Boxes, Pair


class ClipBoxes(NamedTuple):
    """Boxes of a clip, in pixels."""

    boxes: Boxes  # (n, 4)
    numbers: npt.NDArray[np.int64]  # (n,) indices into the boxes of the key frame


class TrainingTransform:
    """Resize the short side, crop and flip at random; then clip and jitter the boxes.

    Deviations from the official code: a box entirely outside the crop is dropped rather than kept as a sliver at the
    border, and colours are not jittered.
    """

    def __init__(self, data: DetectionDataConfig, clip: ClipConfig) -> None:
        self.data, self.size = data, clip.size

    def __call__(self, frames: Tensor, key_frame: Any, draws: random.Random) -> tuple[Tensor, ClipBoxes]:
        frames, boxes = resize_short_side(frames, key_frame.boxes, self.data.short_side, self.data.interpolation)
        frames, boxes = random_crop(frames, boxes, self.size, draws)
        if self.data.flip and draws.random() < 0.5:
            frames, boxes = flip(frames, boxes)
        height, width = self.size
        inside = box.clip(boxes, width, height)
        numbers = np.flatnonzero(box.have_area(inside))
        moved = box.clip(box.jitter(inside[numbers], self.data.jitter_out, self.data.jitter_in, draws), width, height)
        return frames, ClipBoxes(moved, numbers)


class EvaluationTransform:
    """Resize the whole frame to fit, with a short side of at most the training scale.

    Enlarges boxes by `extend` and clips them to the frame.
    """

    def __init__(self, data: DetectionDataConfig, clip: ClipConfig, extend: Pair) -> None:
        self.data, self.size, self.extend = data, clip.size, extend
        self.fill = torch.tensor([round(255 * value) for value in clip.mean], dtype=torch.uint8)

    def __call__(self, frames: Tensor, key_frame: Any, draws: random.Random) -> tuple[Tensor, ClipBoxes]:
        frames, boxes = fit(frames, key_frame.boxes, self.size, self.data.short_side, self.data.interpolation)
        boxes = box.clip(box.extend(boxes, self.extend), frames.shape[2], frames.shape[1])
        canvas = self.fill.expand(len(frames), *self.size, 3).clone()  # mean colour: near 0 after normalisation
        canvas[:, : frames.shape[1], : frames.shape[2]] = frames
        return canvas, ClipBoxes(boxes, np.arange(len(boxes)))


# Transforms of frames (T, H, W, 3) and boxes. Resizing expects boxes as fractions of the frame.


def resize_short_side(
    frames: Tensor, fractions: Boxes, short: int, interpolation: Interpolation
) -> tuple[Tensor, Boxes]:
    height, width = frames.shape[1:3]
    factor = short / min(height, width)
    return _resize(frames, fractions, (round(height * factor), round(width * factor)), interpolation)


def fit(frames: Tensor, fractions: Boxes, size: Size, short: int, interpolation: Interpolation) -> tuple[Tensor, Boxes]:
    """Resize to fit into `size` with the short side at most `short`, keeping the aspect ratio."""
    height, width = frames.shape[1:3]
    factor = min(size[0] / height, size[1] / width, short / min(height, width))
    target = max(1, round(height * factor)), max(1, round(width * factor))
    return _resize(frames, fractions, target, interpolation)


def random_crop(frames: Tensor, boxes: Boxes, size: Size, draws: random.Random) -> tuple[Tensor, Boxes]:
    """Crop frames at random; boxes may extend beyond the crop."""
    top, left = (draws.randrange(side - out + 1) for side, out in zip(frames.shape[1:3], size, strict=True))
    return frames[:, top : top + size[0], left : left + size[1]], box.shift(boxes, -left, -top)


def flip(frames: Tensor, boxes: Boxes) -> tuple[Tensor, Boxes]:
    return mirror(frames), box.mirror(boxes, frames.shape[2])


def _resize(frames: Tensor, fractions: Boxes, size: Size, interpolation: Interpolation) -> tuple[Tensor, Boxes]:
    whole = Box(0, 0, frames.shape[1], frames.shape[2])
    return resize_box(frames, whole, size, interpolation), box.scale(fractions, size[1], size[0])
