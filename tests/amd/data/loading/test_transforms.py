"""Tests for crops, resizing and flips: official boxes, PIL parity and invariants."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from amd.config import ClipConfig, Crop, DataConfig, Interpolation
from amd.data.loading import transforms
from amd.data.loading.transforms import Box

PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def _frames(count: int = 3, height: int = 64, width: int = 86, seed: int = 0) -> Tensor:
    """Return noise over a gradient, sharp enough to reveal a wrong filter or a half-pixel shift."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, None, :, None] * np.ones((count, height, 1, 3))
    return torch.from_numpy(np.clip(ramp + rng.integers(0, 56, ramp.shape), 0, 255).astype(np.uint8))


def test_multi_scale_boxes_match_the_official_code(golden: Path) -> None:
    for case in json.loads((golden / "multiscale_crop.json").read_text()):
        width, height = case["size"]
        draws = random.Random(case["py_seed"])
        # The golden file has the size and offset of each draw.
        for w, h, x, y in case["draws_w_h_x_y"]:
            assert transforms.multi_scale_box((height, width), (224, 224), draws) == Box(y, x, h, w)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(16, 16), (16, 32), (48, 16)]), st.integers(0, 99))
def test_every_box_is_inside_the_frame(height: int, width: int, size: tuple[int, int], seed: int) -> None:
    draws = random.Random(seed)
    for box in (
        transforms.multi_scale_box((height, width), size, draws),
        transforms.random_resized_box((height, width), size, (0.2, 1.0), draws),
        transforms.center_box((height, width), size),
    ):
        assert box.height >= 1
        assert box.width >= 1
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width


@given(st.integers(0, 500))
def test_random_resized_boxes_respect_area_and_aspect_ratio(seed: int) -> None:
    box = transforms.random_resized_box((200, 200), (100, 100), (0.2, 0.5), random.Random(seed))
    assert 0.19 < box.height * box.width / 200**2 < 0.51
    assert 0.73 < box.width / box.height < 1.36


def test_random_resized_boxes_cover_the_frame() -> None:
    draws = random.Random(0)
    boxes = [transforms.random_resized_box((120, 160), (64, 64), (0.2, 1.0), draws) for _ in range(2000)]
    areas = np.array([box.height * box.width / (120 * 160) for box in boxes])
    assert areas.min() < 0.22
    # Large squares do not fit a 4:3 frame, so the mean area is below the middle of the range.
    assert 0.4 < areas.mean() < 0.6
    assert {box.top == 0 for box in boxes} == {True, False}
    assert max(box.left + box.width for box in boxes) == 160


def test_a_frame_too_elongated_for_any_draw_falls_back_to_a_center_box() -> None:
    box = transforms.random_resized_box((10, 1000), (64, 64), (0.9, 1.0), random.Random(0))
    assert box == Box(0, 493, 10, 13)


def test_boxes_keep_the_aspect_ratio_of_a_non_square_output() -> None:
    draws = random.Random(0)
    assert transforms.center_box((256, 340), (112, 224)) == Box(43, 0, 170, 340)
    for _ in range(50):
        box = transforms.multi_scale_box((256, 340), (112, 224), draws)
        assert 2 / 1.4 < box.width / box.height < 2 * 1.4  # scales differ by at most one


@pytest.mark.parametrize("interpolation", get_args(Interpolation))
@pytest.mark.parametrize(
    ("box", "size"),
    [
        (Box(3, 7, 50, 61), (32, 32)),  # down
        (Box(3, 7, 20, 17), (32, 48)),  # up, not square
        (Box(0, 0, 64, 86), (56, 40)),  # the whole frame
        (Box(10, 30, 32, 32), (32, 32)),  # crop only
    ],
)
def test_resizing_matches_pil_within_1_of_255(box: Box, size: tuple[int, int], interpolation: Interpolation) -> None:
    frames = _frames()
    got = transforms.resize_box(frames, box, size, interpolation)
    assert got.dtype == torch.uint8
    for frame, resized in zip(frames, got, strict=True):
        image = Image.fromarray(frame.numpy())
        cut = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        expected = np.asarray(cut.resize((size[1], size[0]), PIL_FILTERS[interpolation]))
        assert np.abs(expected.astype(int) - resized.numpy().astype(int)).max() <= 1


@settings(deadline=None)
@given(st.sampled_from(get_args(Crop)), st.booleans(), st.integers(0, 1000))
def test_augmentation_is_the_same_in_all_frames(crop: Crop, flip: bool, seed: int) -> None:
    still = _frames(1).expand(4, -1, -1, -1)
    data = DataConfig(train="x", crop=crop, flip=flip)
    clip = ClipConfig(frames=4, size=(16, 32), patch=16)
    got = transforms.augment(still, data, clip, random.Random(seed))
    assert got.shape == (4, 16, 32, 3)
    assert got.dtype == torch.uint8
    assert (got == got[0]).all()
    assert torch.equal(got, transforms.augment(still, data, clip, random.Random(seed)))


def test_flips_mirror_about_half_of_the_clips_if_enabled_and_none_otherwise() -> None:
    frames, clip = _frames(2), ClipConfig(frames=2, size=32)
    plain = transforms.center(frames, DataConfig(train="x"), clip)
    data = DataConfig(train="x", crop="center", flip=True)
    draws = random.Random(0)
    clips = [transforms.augment(frames, data, clip, draws) for _ in range(200)]
    mirrored = [bool(torch.equal(got, torch.from_numpy(plain.numpy()[:, :, ::-1].copy()))) for got in clips]
    assert 70 < sum(mirrored) < 130
    assert all(torch.equal(got, plain) for got, other in zip(clips, mirrored, strict=True) if not other)
    still = DataConfig(train="x", crop="center")
    assert all(torch.equal(transforms.augment(frames, still, clip, draws), plain) for _ in range(20))


def test_a_clip_view_moves_channels_first_without_copying() -> None:
    frames = _frames(4)
    clip = transforms.clip_view(frames)
    assert clip.shape == (3, 4, 64, 86)
    assert clip.data_ptr() == frames.data_ptr()
    assert torch.equal(clip[1, 2], frames[2, :, :, 1])


def test_every_crop_option_is_implemented() -> None:
    assert set(transforms.BOXES) == set(get_args(Crop))


def test_spatial_views_match_the_official_crops_along_the_longer_side() -> None:
    data, clip = DataConfig(train="x"), ClipConfig(frames=3, size=32, patch=4, tubelet=1)
    for height, width in ((64, 87), (87, 64)):
        frames = _frames(3, height, width)
        whole = (32, 43) if height < width else (43, 32)  # the shorter side resized to 32
        resized = transforms.resize_box(frames, Box(0, 0, height, width), whole)
        for crops in (2, 3, 5):
            starts = [int(j * 11 / (crops - 1)) for j in range(crops)]
            views = transforms.spatial_views(frames, data, clip, crops)
            places = [(0, at) if height < width else (at, 0) for at in starts]
            assert len(views) == crops
            for view, (top, left) in zip(views, places, strict=True):
                assert torch.equal(view, resized[:, top : top + 32, left : left + 32])


def test_a_single_spatial_view_is_the_center_crop() -> None:
    data, clip = DataConfig(train="x", center_fraction=0.875), ClipConfig(frames=3, size=32, patch=4, tubelet=1)
    (view,) = transforms.spatial_views(_frames(), data, clip, 1)
    assert torch.equal(view, transforms.center(_frames(), data, clip))


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(16, 16), (16, 32), (48, 16)]), st.integers(1, 5))
@settings(max_examples=50)
def test_every_spatial_view_has_the_clip_size(height: int, width: int, size: tuple[int, int], crops: int) -> None:
    clip = ClipConfig(frames=1, size=size, patch=4, tubelet=1)
    views = transforms.spatial_views(_frames(1, height, width), DataConfig(train="x"), clip, crops)
    assert [view.shape for view in views] == [(1, *size, 3)] * crops
