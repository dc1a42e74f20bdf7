from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amd.config import TokenGrid
from amd.tokens import patchify, position_table, take_tokens, unpatchify


def test_tokens_are_ordered_by_time_row_and_column_with_channels_last() -> None:
    clips = torch.arange(2 * 3 * 4 * 4 * 6).reshape(2, 3, 4, 4, 6)
    tokens = patchify(clips, tubelet=2, patch=2)
    assert tokens.shape == (2, 2 * 2 * 3, 2 * 2 * 2 * 3)
    t, row, column = 1, 1, 2
    cube = clips[1, :, 2 * t : 2 * t + 2, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(tokens[1, t * 6 + row * 3 + column], cube.permute(1, 2, 3, 0).flatten())


def test_unpatchify_inverts_patchify() -> None:
    clips = torch.randint(0, 256, (2, 3, 4, 8, 12), dtype=torch.uint8)
    assert torch.equal(unpatchify(patchify(clips, 2, 4), TokenGrid(2, 2, 3), 2, 4), clips)


def test_a_clip_that_is_not_divisible_into_tokens_raises() -> None:
    with pytest.raises(ValueError, match="3x4x4"):
        patchify(torch.zeros(1, 3, 3, 4, 4), tubelet=2, patch=4)


def test_tokens_are_gathered_per_row() -> None:
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    taken = take_tokens(tokens, torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(taken, torch.tensor([[[4.0, 5], [0, 1]], [[8, 9], [8, 9]]]))


def test_1d_positions_match_the_official_table(golden: Path) -> None:
    tables = load_file(golden / "sinusoid.safetensors")
    for name in ("n32_d48", "n32_d64", "n8_d30", "n5_d7"):
        count, width = (int(part[1:]) for part in name.split("_"))
        ours = position_table("sincos_1d", TokenGrid(1, 1, count), width)
        torch.testing.assert_close(ours, tables[name][0], rtol=0, atol=1e-6)
    ours = position_table("sincos_1d", TokenGrid(8, 14, 14), 768)
    rows, columns = tables["n1568_d768_rows"].long(), tables["n1568_d768_cols"].long()
    torch.testing.assert_close(ours[rows][:, columns], tables["n1568_d768_sub"].squeeze(0), rtol=0, atol=1e-6)


def test_2d_positions_match_the_mae_table_in_every_frame(golden: Path) -> None:
    tables = load_file(golden / "mae_golden.safetensors")
    names = [name for name in tables if name.startswith("pos2d.")]
    assert names
    for name in names:
        width, side = (int(part[1:]) for part in name.split(".")[1].split("_")[:2])
        ours = position_table("sincos_2d", TokenGrid(2, side, side), width)
        expected = tables[name].reshape(-1, width)[1:].float()  # row 0 belongs to the class token
        torch.testing.assert_close(ours[: side * side], expected, rtol=0, atol=1e-6)
        assert torch.equal(ours[: side * side], ours[side * side :])


def test_3d_positions_are_unique_per_token() -> None:
    grid = TokenGrid(3, 2, 4)
    table = position_table("sincos_3d", grid, 32)
    assert table.shape == (grid.tokens, 32)
    assert len(table.unique(dim=0)) == grid.tokens
