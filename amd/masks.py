"""Asymmetric masking. A strategy only groups tokens into equal cells; one sampler serves all.

Knows nothing of clips or networks: a token grid in, token indices out. Randomness is handed in, counts are exact and
the same in every row, so nothing in a step depends on the data.
Shapes: B batch, N tokens, G cells, S tokens a cell, V student-visible, O teacher-only, M student-masked, R rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from amd.config import MaskConfig, MaskStrategy, TokenGrid
from amd.tokens import TokenSets

Cells = Callable[[TokenGrid], Tensor]  # the tokens of every cell, (S, G)


def random_cells(grid: TokenGrid) -> Tensor:
    """Every token is a cell of its own (MAE)."""
    return torch.arange(grid.tokens).reshape(1, grid.tokens)


def tube_cells(grid: TokenGrid) -> Tensor:
    """A cell is one place in all frames (VideoMAE): what is hidden cannot be copied from the frame before."""
    return torch.arange(grid.tokens).reshape(grid.frames, grid.per_frame)


STRATEGIES: dict[MaskStrategy, Cells] = {"random": random_cells, "tube": tube_cells}


def sample_token_sets(mask: MaskConfig, grid: TokenGrid, batch: int, generator: torch.Generator) -> TokenSets:
    """Draw the token sets of a batch on the generator's device.

    One order of the cells serves both networks: the first are visible to both, the next to the teacher only, so the
    student's tokens are always among the teacher's.
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
    rebuilt = student_masked
    if mask.decoder == "running_cell":
        rebuilt = _running_cell(student_masked, grid, mask.decoder_ratio, generator)
    return TokenSets(_tokens(cells, visible), _tokens(cells, teacher_only), student_masked, rebuilt)


@cache  # copied to the device once, not in every step
def _cells(strategy: MaskStrategy, grid: TokenGrid, device: torch.device) -> Tensor:
    return STRATEGIES[strategy](grid).to(device)


def _tokens(cells: Tensor, chosen: Tensor) -> Tensor:
    """The tokens of the chosen cells in raster order: (S, G) and (B, k) -> (B, S * k)."""
    return cells[:, chosen.sort(dim=1).values].transpose(0, 1).reshape(chosen.shape[0], -1)


def _running_cell(student_masked: Tensor, grid: TokenGrid, ratio: float, generator: torch.Generator) -> Tensor:
    """Leave out `ratio` of the student-masked tokens, those first that VideoMAE V2's running cell leaves out.

    Every 2x2 cell drops 4 * ratio of its places, and the dropped ones move on by one place a frame. V2 keeps the cell's
    tokens whether masked or not and weighs the visible ones with 0 in the loss; here the count of rebuilt tokens is
    fixed instead (shapes stay static, nothing is computed in vain), topped up or thinned at random.
    """
    device, batch = generator.device, student_masked.shape[0]
    phase = torch.randint(4, (batch, 1), generator=generator, device=device)
    place = (_running_places(grid, device) + phase) % 4  # (B, N)
    dropped = place < round(4 * ratio)
    noise = torch.rand(student_masked.shape, generator=generator, device=device)
    rank = (noise + dropped.gather(1, student_masked)).argsort(dim=1)
    kept = student_masked.shape[1] - int(ratio * student_masked.shape[1])
    return student_masked.gather(1, rank[:, :kept]).sort(dim=1).values


@cache
def _running_places(grid: TokenGrid, device: torch.device) -> Tensor:
    """(1, N): each token's place on the ring around its 2x2 cell, moved on by one a frame."""
    ring = torch.tensor([[0, 1], [3, 2]])
    index = torch.arange(grid.tokens)
    frame, row, column = index // grid.per_frame, index % grid.per_frame // grid.width, index % grid.width
    return (ring[row % 2, column % 2] + frame)[None].to(device)
