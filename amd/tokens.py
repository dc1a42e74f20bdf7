"""Convert clips to tokens and back, gather tokens by index, and compute position tables.

Shapes: B batch, C channels, T frames, H height, W width, N tokens, P pixel values per token, K gathered tokens, D
width, V student-visible, O teacher-only, M student-masked, R reconstructed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from amd.config import Positions, TokenGrid


class TokenSets(NamedTuple):
    """Token indices by role: int64, ascending in each row, with equal counts in all rows of the batch."""

    student_visible: Tensor  # (B, V), visible to both networks
    teacher_only: Tensor  # (B, O), visible only to the teacher; O = 0 if the mask ratios are equal
    student_masked: Tensor  # (B, M), hidden from the student; contains teacher_only
    reconstructed: Tensor  # (B, R), the student-masked tokens that the decoder reconstructs

    def rows(self, start: int, stop: int) -> TokenSets:
        """Return the token sets for a slice of the batch."""
        return TokenSets(*(index[start:stop] for index in self))


def patchify(clips: Tensor, tubelet: int, patch: int) -> Tensor:
    """Cut clips into flat pixel tokens.

    (B, C, T, H, W) -> (B, N, P) with P = tubelet * patch**2 * C, channels last, as in VideoMAE and MAE; any dtype.
    Raises ValueError if T is not a multiple of `tubelet`, or H or W of `patch`.
    """
    b, c, t, h, w = clips.shape
    if t % tubelet or h % patch or w % patch:
        raise ValueError(
            f"a clip of {t}x{h}x{w} cannot be cut into tokens of {tubelet}x{patch}x{patch}: "
            "each clip dimension must be a multiple of the corresponding token dimension"
        )
    cut = clips.reshape(b, c, t // tubelet, tubelet, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, -1, tubelet * patch * patch * c)


def unpatchify(tokens: Tensor, grid: TokenGrid, tubelet: int, patch: int) -> Tensor:
    """Invert patchify: (B, N, P) -> (B, C, T, H, W)."""
    b = tokens.shape[0]
    cut = tokens.reshape(b, *grid, tubelet, patch, patch, -1)
    return cut.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(
        b, -1, grid.frames * tubelet, grid.height * patch, grid.width * patch
    )


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather tokens by index: (B, N, D) and (B, K) -> (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def put_tokens(tokens: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return `tokens` (B, N, D) with `values` (B, K, D) written at `index` (B, K)."""
    return tokens.scatter(1, index.unsqueeze(-1).expand_as(values), values)


def position_table(
    kind: Positions, grid: TokenGrid, width: int, base: float = 10_000.0, origin: tuple[int, int] | None = None
) -> Tensor:
    """Return the sine-cosine position embedding of every token, (N, width) float32, computed in float64.

    sincos_1d: over the flattened index, sine and cosine interleaved (VideoMAE, AMD).
    sincos_2d: half the width from the column, half from the row, sines before cosines in each half, the same in every
    frame (MAE).
    sincos_3d: a quarter of the width from the frame, the remainder as in sincos_2d (MVD).
    learned: the same as sincos_1d, which initialises the encoder's table and serves as the predictors' fixed table.
    `origin`: rows and columns of the sincos_2d table to interpolate to `grid` (bicubic), as in MAE's fine-tuning.
    """
    t, h, w = grid
    if origin is not None and origin != (h, w):
        assert kind == "sincos_2d", "validated: only 2-D tables are interpolated"
        plane = position_table(kind, TokenGrid(1, *origin), width, base).T.unflatten(
            1, origin
        )  # (width, rows, columns)
        resized = functional.interpolate(plane[None], size=(h, w), mode="bicubic", align_corners=False)[0]
        return resized.flatten(1).T.repeat(t, 1)
    if kind in ("sincos_1d", "learned"):
        angles = torch.arange(grid.tokens, dtype=torch.float64)[:, None] / _frequencies_1d(width, base)
        table = torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())
        return table.float()
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    plane = width if kind == "sincos_2d" else width // 4 * 3
    space = torch.cat([_sines(columns.flatten(), plane // 2, base), _sines(rows.flatten(), plane // 2, base)], dim=1)
    space = space.repeat(t, 1)  # (N, plane)
    if kind == "sincos_2d":
        return space.float()
    time = _sines(torch.arange(t), width - plane, base).repeat_interleave(h * w, dim=0)
    return torch.cat([time, space], dim=1).float()


def _frequencies_1d(width: int, base: float) -> Tensor:
    """Return base^(2 floor(j / 2) / width) for each j; each pair of sine and cosine shares one value."""
    pairs = torch.arange(width, dtype=torch.float64).div(2, rounding_mode="floor")
    return torch.tensor(base, dtype=torch.float64) ** (2 * pairs / width)


def _sines(positions: Tensor, width: int, base: float) -> Tensor:
    """Embed positions (n,) -> (n, width): width/2 sines, then width/2 cosines."""
    exponents = torch.arange(width // 2, dtype=torch.float64) / (width / 2)
    angles = positions.double()[:, None] / torch.tensor(base, dtype=torch.float64) ** exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)
