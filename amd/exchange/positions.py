"""Position tables in third-party files: identify their kind and grid, and resample them to another grid.

Shapes: N tokens, (t, h, w) the file's grid, (T, H, W) our grid, D width.
"""

from __future__ import annotations

import math
from typing import get_args

from torch import Tensor
from torch.nn import functional

from amd.config import Positions, TokenGrid
from amd.tokens import position_table

TABLE_TOLERANCE = 2e-3  # half-precision files round positions; different kinds of tables differ by up to 2


def fixed_kind(table: Tensor, grid: TokenGrid, base: float) -> Positions | None:
    """Return the kind of a fixed position table (N, D) for `grid`, or None if the table is learned."""
    width = table.shape[1]
    kinds: dict[Positions, int] = {"sincos_1d": 1, "sincos_2d": 4, "sincos_3d": 16}
    assert {*kinds, "learned"} == set(get_args(Positions))
    for kind, parts in kinds.items():
        if width % parts == 0 and table.shape[0] == grid.tokens:
            fixed = position_table(kind, grid, width, base)
            if (fixed - table.float()).abs().max() < TABLE_TOLERANCE:
                return kind
    return None


def grid_of(tokens: int, ours: TokenGrid, *, image: bool) -> TokenGrid | None:
    """Infer the token grid from the number of tokens: our grid if it fits, else square frames.

    `image`: whether the weights embed single frames, so that all tokens belong to one frame. Otherwise the grid must
    have as many frames as ours, or frames of the same size. Returns None if neither fits.
    """
    if tokens == (ours.per_frame if image else ours.tokens):
        return TokenGrid(1 if image else ours.frames, ours.height, ours.width)
    frames = 1 if image else ours.frames
    side = math.isqrt(tokens // frames)
    if frames * side * side == tokens:
        return TokenGrid(frames, side, side)
    if not image and tokens % ours.per_frame == 0:
        return TokenGrid(tokens // ours.per_frame, ours.height, ours.width)
    return None


def resample(table: Tensor, grid: TokenGrid, new: TokenGrid) -> Tensor:
    """Resample a table (t h w, D) to (T H W, D) float32: bicubic in space, as in timm, and linear in time.

    If both grids are equal, the table is returned unchanged.
    """
    if grid == new:
        return table
    cube = table.float().unflatten(0, tuple(grid)).permute(0, 3, 1, 2)  # (t, D, h, w)
    if grid[1:] != new[1:]:
        cube = functional.interpolate(cube, size=tuple(new[1:]), mode="bicubic", antialias=True)  # (t, D, H, W)
    if grid.frames != new.frames:
        lines = cube.flatten(1).T[None]  # (1, D H W, t)
        lines = functional.interpolate(lines, size=new.frames, mode="linear")  # (1, D H W, T)
        cube = lines[0].T.unflatten(1, cube.shape[1:])  # (T, D, H, W)
    resampled: Tensor = cube.permute(0, 2, 3, 1).flatten(0, 2)
    return resampled
