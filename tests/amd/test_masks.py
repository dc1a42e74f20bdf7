from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.config import MaskConfig, MaskStrategy, TokenGrid
from amd.masks import STRATEGIES, sample_token_sets
from amd.tokens import TokenSets


def draw(mask: MaskConfig, grid: TokenGrid, batch: int = 3, seed: int = 0) -> TokenSets:
    return sample_token_sets(mask, grid, batch, torch.Generator().manual_seed(seed))


def test_every_configurable_strategy_is_implemented() -> None:
    assert set(STRATEGIES) == set(get_args(MaskStrategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_token_sets_are_sorted_and_disjoint_and_cover_the_grid(strategy: MaskStrategy, data: st.DataObject) -> None:
    grid = TokenGrid(*(data.draw(st.integers(1, 5)) for _ in range(3)))
    ratios = sorted(data.draw(st.floats(0, 0.99)) for _ in range(2))
    mask = MaskConfig(strategy=strategy, teacher_ratio=ratios[0], student_ratio=ratios[1])
    sets = draw(mask, grid, seed=data.draw(st.integers(0, 99)))
    cells = grid.per_frame if strategy == "tube" else grid.tokens
    size = grid.tokens // cells
    assert sets.student_masked.shape[1] == int(ratios[1] * cells) * size
    assert sets.teacher_only.shape[1] == (int(ratios[1] * cells) - int(ratios[0] * cells)) * size
    for row in range(3):
        visible, only, masked, reconstructed = (index[row].tolist() for index in sets)
        assert sorted(visible + masked) == list(range(grid.tokens))
        assert set(only) <= set(masked)
        assert reconstructed == masked
        for group in (visible, only, masked):
            assert group == sorted(set(group))


def test_tube_masking_hides_the_same_positions_in_all_frames() -> None:
    sets = draw(MaskConfig(strategy="tube", student_ratio=0.75, teacher_ratio=0.5), TokenGrid(4, 3, 4))
    for index in sets:
        positions = index.reshape(3, 4, -1) - 12 * torch.arange(4)[None, :, None]
        assert (positions == positions[:, :1]).all()


@pytest.mark.parametrize(
    ("grid", "student", "teacher", "counts"),
    [  # sizes of the official configurations, for a whole clip
        ((8, 14, 14), 0.90, 0.75, (160, 232, 1408)),
        ((8, 14, 14), 0.90, 0.80, (160, 160, 1408)),
        ((8, 14, 14), 0.90, 0.50, (160, 624, 1408)),
        ((8, 14, 14), 0.75, 0.50, (392, 392, 1176)),
        ((1, 14, 14), 0.75, 0.50, (49, 49, 147)),
        ((8, 14, 14), 0.90, 0.90, (160, 0, 1408)),  # the official code fails here: no token is teacher-only
        ((8, 14, 14), 0.90, 0.0, (160, 1408, 1408)),  # and here: the teacher sees the full clip
    ],
)
def test_token_counts_match_the_official_code(
    grid: tuple[int, int, int], student: float, teacher: float, counts: tuple[int, int, int]
) -> None:
    sets = draw(MaskConfig(strategy="tube", student_ratio=student, teacher_ratio=teacher), TokenGrid(*grid))
    assert tuple(index.shape[1] for index in sets[:3]) == counts


def test_token_counts_match_masks_recorded_from_the_official_generator(golden: Path) -> None:
    cases = json.loads((golden / "masks.json").read_text())
    assert len(cases) >= 3
    for case in cases:
        grid = TokenGrid(*case["grid"])
        mask = MaskConfig(strategy="tube", student_ratio=case["mask_ratio"], teacher_ratio=case["mask_ratio_teacher"])
        sets = draw(mask, grid)
        for codes in case["draws"]:
            assert sets.student_visible.shape[1] == codes.count("0") * grid.frames
            assert sets.teacher_only.shape[1] == codes.count("1") * grid.frames
            assert sets.student_masked.shape[1] == (codes.count("1") + codes.count("2")) * grid.frames


def test_masks_depend_only_on_the_generator() -> None:
    mask, grid = MaskConfig(), TokenGrid(8, 14, 14)
    assert all(torch.equal(a, b) for a, b in zip(draw(mask, grid, seed=4), draw(mask, grid, seed=4), strict=True))
    assert not torch.equal(draw(mask, grid, seed=4).student_visible, draw(mask, grid, seed=5).student_visible)


def test_every_position_is_hidden_equally_often() -> None:
    mask, grid = MaskConfig(student_ratio=0.75, teacher_ratio=0.5), TokenGrid(2, 4, 4)
    hidden = draw(mask, grid, batch=4000).student_masked
    share = torch.bincount(hidden.flatten(), minlength=grid.tokens) / 4000
    assert (share - 0.75).abs().max() < 0.04  # about six standard deviations


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_running_cell_omits_tokens_evenly_and_moves_between_frames(ratio: float) -> None:
    grid = TokenGrid(4, 4, 4)
    mask = MaskConfig(student_ratio=0.9, teacher_ratio=0.75, decoder="running_cell", decoder_ratio=ratio)
    sets = draw(mask, grid, batch=64)
    masked, reconstructed = sets.student_masked.shape[1], sets.reconstructed.shape[1]
    assert reconstructed == masked - int(ratio * masked)
    for row in range(64):
        assert set(sets.reconstructed[row].tolist()) <= set(sets.student_masked[row].tolist())
    if ratio == 0.5:  # a position omitted in one frame returns two frames later
        positions = sets.reconstructed % grid.per_frame
        frames = sets.reconstructed // grid.per_frame
        for row in range(8):
            kept = {(int(f), int(p)) for f, p in zip(frames[row], positions[row], strict=True)}
            always = [p for p in range(16) if all((f, p) in kept for f in range(4))]
            assert len(always) <= 4
