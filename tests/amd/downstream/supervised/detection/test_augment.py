"""Transforms move boxes with pixels: the box of a drawn rectangle still encloses it after each transform."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amd.config import ClipConfig, DetectionDataConfig
from amd.data.dataset.record import Record
from amd.downstream.supervised.detection.augment import (
    EvaluationTransform,
    TrainingTransform,
    flip,
    random_crop,
    resize_short_side,
)
from amd.downstream.supervised.detection.ava import KeyFrame
from amd.downstream.supervised.detection.boxes import Boxes, extend

CLIP = ClipConfig(frames=2, size=(32, 48), patch=16)


def _data(**values: Any) -> DetectionDataConfig:
    without_jitter: dict[str, Any] = {"jitter_out": (0, 0), "jitter_in": (0, 0), "short_side": 50}
    return DetectionDataConfig(train="t.csv", label_map="m.pbtxt", **{**without_jitter, **values})


def _scene(height: int, width: int, corner: tuple[int, int, int, int]) -> tuple[Tensor, KeyFrame]:
    """Return two frames with a bright rectangle, and a key frame with its box."""
    x1, y1, x2, y2 = corner
    frames = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    frames[:, y1:y2, x1:x2] = 255
    fractions = np.array([[x1 / width, y1 / height, x2 / width, y2 / height]])
    return frames, KeyFrame(Record("v.mp4", None, "video"), 1.0, fractions)


def _bright_box(frames: Tensor) -> list[int]:
    """Return the box around the bright pixels."""
    rows, columns = torch.nonzero(frames[0, :, :, 0] > 127, as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@st.composite
def _scenes(draw: st.DrawFn) -> tuple[Tensor, KeyFrame]:
    height, width = draw(st.integers(40, 120)), draw(st.integers(40, 120))
    x1, y1 = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    x2, y2 = draw(st.integers(x1 + 10, width)), draw(st.integers(y1 + 10, height))
    return _scene(height, width, (x1, y1, x2, y2))


@settings(deadline=None, max_examples=80)
@given(scene=_scenes(), seed=st.integers(0, 10_000), mirrored=st.booleans())
def test_training_transforms_move_boxes_with_the_pixels(
    scene: tuple[Tensor, KeyFrame], seed: int, mirrored: bool
) -> None:
    clip, clip_boxes = TrainingTransform(_data(flip=mirrored), CLIP)(*scene, random.Random(seed))
    assert clip.shape == (2, 32, 48, 3)
    if len(clip_boxes.boxes) and (clip_boxes.boxes[0, 2:] - clip_boxes.boxes[0, :2]).min() > 2:
        np.testing.assert_allclose(clip_boxes.boxes[0], _bright_box(clip), atol=1.0)
    elif not len(clip_boxes.boxes):
        assert clip.max() < 128  # the crop excludes the rectangle


@settings(deadline=None, max_examples=40)
@given(scene=_scenes())
def test_the_evaluation_transform_moves_boxes_with_the_pixels(scene: tuple[Tensor, KeyFrame]) -> None:
    clip, clip_boxes = EvaluationTransform(_data(), CLIP.model_copy(update={"mean": (0.0, 0.0, 0.0)}), (0, 0))(
        *scene, random.Random()
    )
    assert clip.shape == (2, 32, 48, 3)
    if (clip_boxes.boxes[0, 2:] - clip_boxes.boxes[0, :2]).min() > 2:
        np.testing.assert_allclose(clip_boxes.boxes[0], _bright_box(clip), atol=1.0)


@pytest.mark.parametrize("step", ["resize", "crop", "flip"])
def test_each_transform_moves_boxes_with_the_pixels(step: str) -> None:
    frames, key_frame = _scene(60, 80, (20, 15, 50, 40))
    pixels: Boxes = np.array([[20.0, 15.0, 50.0, 40.0]])
    if step == "resize":
        moved, boxes = resize_short_side(frames, key_frame.boxes, 30, "bilinear")
        assert moved.shape[1:3] == (30, 40)
    elif step == "crop":
        moved, boxes = random_crop(frames, pixels, (48, 64), random.Random(3))
        assert moved.shape[1:3] == (48, 64)
        assert boxes.tolist() != pixels.tolist()
    else:
        moved, boxes = flip(frames, pixels)
        assert boxes[0, 0] == 30
    np.testing.assert_allclose(boxes[0], _bright_box(moved), atol=0.5)


def test_a_box_outside_the_crop_is_dropped_and_the_remaining_boxes_keep_their_indices() -> None:
    frames, key_frame = _scene(50, 400, (0, 0, 20, 20))
    both = key_frame._replace(boxes=np.array([[0, 0, 0.05, 0.4], [0, 0, 1, 1]]))
    for seed in range(20):
        _, clip_boxes = TrainingTransform(_data(), CLIP)(frames, both, random.Random(seed))
        assert clip_boxes.numbers.tolist() in ([1], [0, 1])
        assert len(clip_boxes.boxes) == len(clip_boxes.numbers)


def test_evaluated_boxes_are_extended_within_the_frame_but_not_into_the_padding() -> None:
    frames, key_frame = _scene(64, 64, (0, 32, 64, 64))
    clip, clip_boxes = EvaluationTransform(_data(), CLIP, (0.1, 0.5))(frames, key_frame, random.Random())
    assert clip_boxes.boxes.tolist() == [[0, 12, 32, 32]]  # 16 high, 4 more above, clipped to the 32 x 32 frame
    assert extend(np.array([[0.0, 16, 32, 32]]), (0.1, 0.5))[0, 3] > 32
    assert clip[0, 0, 40].tolist() == [124, 116, 104]  # padding has the mean colour


def test_the_same_seed_produces_the_same_clip_and_boxes() -> None:
    scene = _scene(60, 80, (20, 15, 50, 40))
    transform = TrainingTransform(_data(jitter_out=(0.2, 0.1), jitter_in=(0.1, 0.05), flip=True), CLIP)
    one, other = (transform(*scene, random.Random(7)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert one[1].boxes.tolist() == other[1].boxes.tolist()
    assert any(transform(*scene, random.Random(s))[1].boxes.tolist() != one[1].boxes.tolist() for s in range(3))
