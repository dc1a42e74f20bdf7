"""Asymmetric masking: sample which tokens student and teacher see.

A strategy groups the token grid into equal cells; one sampler serves every strategy. Counts are exact and equal in all
rows, so tensor shapes never depend on the data. Does not depend on clips or models.
Shapes: B batch, N tokens, G cells, S tokens per cell, V student-visible, O teacher-only, M student-masked,
R reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from amd.config import MaskConfig, MaskStrategy, TokenGrid
from amd.tokens import TokenSets

CellFunction = Callable[[TokenGrid], Tensor]  # returns the tokens of every cell, (S, G)


def random_cells(grid: TokenGrid) -> Tensor:
    """Make every token a separate cell (MAE)."""
    return torch.arange(grid.tokens).reshape(1, grid.tokens)


def tube_cells(grid: TokenGrid) -> Tensor:
    """Group the tokens at the same position in all frames into one cell, which is hidden in every frame (VideoMAE)."""
    return torch.arange(grid.tokens).reshape(grid.frames, grid.per_frame)


STRATEGIES: dict[MaskStrategy, CellFunction] = {"random": random_cells, "tube": tube_cells}


def sample_token_sets(mask: MaskConfig, grid: TokenGrid, batch: int, generator: torch.Generator) -> TokenSets:
    """Sample the token sets of a batch on the generator's device.

    Student and teacher share one random ordering of the cells: the first cells are visible to both, the next cells only
    to the teacher, so the teacher sees all tokens that the student sees.
    """
    device = generator.device
    cells = _cells(mask.strategy, grid, device)  # (S, G)
    count = cells.shape[1]
    student_hidden = mask.hidden_cells(mask.student_ratio, count)
    teacher_hidden = mask.hidden_cells(mask.teacher_ratio, count)
    order = torch.rand(batch, count, generator=generator, device=device).argsort(dim=1)  # (B, G)
    visible, masked = order.split([count - student_hidden, student_hidden], dim=1)
    teacher_only = masked[:, : student_hidden - teacher_hidden]
    student_masked = _tokens(cells, masked)
    reconstructed = student_masked
    if mask.decoder == "running_cell":
        reconstructed = _running_cell(student_masked, grid, mask.decoder_ratio, generator)
    return TokenSets(_tokens(cells, visible), _tokens(cells, teacher_only), student_masked, reconstructed)


@cache  # copied to the device once, not in every step
def _cells(strategy: MaskStrategy, grid: TokenGrid, device: torch.device) -> Tensor:
    return STRATEGIES[strategy](grid).to(device)


def _tokens(cells: Tensor, chosen: Tensor) -> Tensor:
    """Return the tokens of the chosen cells in raster order: (S, G) and (B, k) -> (B, S * k)."""
    return cells[:, chosen.sort(dim=1).values].transpose(0, 1).reshape(chosen.shape[0], -1)


def _running_cell(student_masked: Tensor, grid: TokenGrid, ratio: float, generator: torch.Generator) -> Tensor:
    """Drop a fraction `ratio` of the student-masked tokens, starting with those that VideoMAE V2's running cell drops.

    Every 2x2 cell drops 4 * ratio of its positions; the dropped positions advance by one per frame. VideoMAE V2 also
    decodes the cell's visible tokens and gives them weight 0 in the loss. Here, random tokens are added or dropped to
    make the number of reconstructed tokens constant, so shapes stay static and no visible token is decoded.
    """
    device, batch = generator.device, student_masked.shape[0]
    phase = torch.randint(4, (batch, 1), generator=generator, device=device)
    position = (_running_positions(grid, device) + phase) % 4  # (B, N)
    dropped = position < round(4 * ratio)
    noise = torch.rand(student_masked.shape, generator=generator, device=device)
    rank = (noise + dropped.gather(1, student_masked)).argsort(dim=1)
    kept = student_masked.shape[1] - int(ratio * student_masked.shape[1])
    return student_masked.gather(1, rank[:, :kept]).sort(dim=1).values


@cache
def _running_positions(grid: TokenGrid, device: torch.device) -> Tensor:
    """Return each token's position (0 to 3) within its 2x2 cell, advanced by one per frame: (1, N)."""
    ring = torch.tensor([[0, 1], [3, 2]])
    index = torch.arange(grid.tokens)
    frame, row, column = index // grid.per_frame, index % grid.per_frame // grid.width, index % grid.width
    return (ring[row % 2, column % 2] + frame)[None].to(device)
