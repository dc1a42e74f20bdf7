from __future__ import annotations

import torch

from amd.lab.layers import COLUMNS, HIGH_ERROR, error_view, sprite_sheet
from amd.lab.view import sample_clip_sets
from tests.support.runs.configs import tiny_image_config


def test_a_sprite_sheet_tiles_frames_row_by_row() -> None:
    frames = torch.randint(0, 256, (3, COLUMNS + 2, 2, 4), dtype=torch.uint8)
    sheet = sprite_sheet(frames)
    assert sheet.shape == (4, COLUMNS * 4, 3)
    for number in (0, 1, COLUMNS - 1, COLUMNS, COLUMNS + 1):
        top, left = number // COLUMNS * 2, number % COLUMNS * 4
        assert torch.equal(sheet[top : top + 2, left : left + 4].permute(2, 0, 1), frames[:, number])
    assert sprite_sheet(frames[:, :1]).shape == (2, 4, 3)


def test_the_largest_error_has_the_strongest_colour() -> None:
    config = tiny_image_config()
    sets = sample_clip_sets(config, 0, 0)
    errors = torch.arange(float(sets.reconstructed.shape[1]))[None]
    tokens = error_view(errors, sets.reconstructed, config.clip)[0]
    worst = int(sets.reconstructed[0, -1])
    strongest = (tokens.unflatten(-1, (-1, 3))[:, 0] == torch.tensor(HIGH_ERROR)).all(dim=-1)
    assert strongest.nonzero().flatten().tolist() == [worst]
