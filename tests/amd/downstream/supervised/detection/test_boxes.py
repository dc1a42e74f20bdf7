from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from amd.downstream.supervised.detection import boxes as box

BOX = np.array([[10.0, 20.0, 30.0, 60.0]])  # 20 wide, 40 high


def test_a_box_is_extended_by_fractions_of_its_size_around_its_center() -> None:
    assert box.extend(BOX, (0.1, 0.05)).tolist() == [[9.0, 19.0, 31.0, 61.0]]


def test_mirroring_twice_changes_nothing() -> None:
    assert box.mirror(BOX, 64).tolist() == [[34.0, 20.0, 54.0, 60.0]]
    assert box.mirror(box.mirror(BOX, 64), 64).tolist() == BOX.tolist()


def test_a_box_outside_the_frame_has_no_area_after_clipping() -> None:
    both = np.concatenate([BOX, BOX + 100])
    assert box.have_area(box.clip(both, 64, 48)).tolist() == [True, False]
    assert box.clip(BOX, 64, 48).tolist() == [[10.0, 20.0, 30.0, 48.0]]


@given(seed=st.integers(0, 1000))
def test_jitter_moves_each_side_within_its_limits(seed: int) -> None:
    moved = box.jitter(BOX, (0.2, 0.1), (0.1, 0.05), random.Random(seed))[0] - BOX[0]
    assert -4 <= moved[0] <= 2  # the left side: 0.2 of 20 outwards, 0.1 inwards
    assert -4 <= moved[1] <= 2  # the top: 0.1 of 40 outwards, 0.05 inwards
    assert -2 <= moved[2] <= 4
    assert -2 <= moved[3] <= 4


def test_jitter_of_zero_changes_nothing() -> None:
    assert box.jitter(BOX, (0, 0), (0, 0), random.Random(0)).tolist() == BOX.tolist()


def test_the_iou_of_two_squares_matches_a_manual_calculation() -> None:
    square, shifted = np.array([[0.0, 0.0, 2.0, 2.0]]), np.array([[1.0, 1.0, 3.0, 3.0]])
    assert box.paired_iou(square, shifted).tolist() == [1 / 7]
    assert box.paired_iou(square, square).tolist() == [1]
    assert box.paired_iou(square, square + 2).tolist() == [0]
