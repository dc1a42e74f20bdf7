"""The ViT encoder used for students, teachers and published models.

Takes flat pixel tokens with their indices, from any masking strategy. Only these tokens are embedded, by a linear layer
that is equivalent to the official convolution, whose stride equals its kernel size.
Shapes: B batch, K given tokens, P pixel values per token, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amd.config import EncoderConfig, TokenGrid
from amd.models.layers import LAYER_NORM_EPS, Block, init_like_torch, init_token, init_weights
from amd.tokens import position_table


class EncoderOutput(NamedTuple):
    """Features computed by an encoder."""

    final: Tensor | None  # (B, [1 +] K, D) after the last norm, class token first if there is one
    intermediates: list[Tensor]  # (B, K, D) after the requested blocks, before any norm, without class token


class Encoder(nn.Module):
    """A plain pre-norm ViT with an optional class token and fixed or learned position embeddings."""

    positions: Tensor

    def __init__(self, config: EncoderConfig, grid: TokenGrid, token_values: int) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.patch_embed = nn.Linear(token_values, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        rates = [config.drop_path * block / max(1, config.depth - 1) for block in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        table = position_table(config.positions, grid, config.width, config.position_base, config.position_grid)
        if config.positions == "learned":
            self.positions = nn.Parameter(table)  # (N, D)
        else:
            self.register_buffer("positions", table, persistent=False)  # (N, D)
        init_weights(self, config.init)
        if config.init == "videomae":
            init_like_torch(self.patch_embed)
        if self.class_token is not None:
            init_token(self.class_token, config.init)

    def interpolate_positions(self, origin: tuple[int, int]) -> None:
        """Replace the 2-D position table with one interpolated from the grid `origin` to this encoder's grid."""
        config = self.config = self.config.model_copy(update={"position_grid": origin})
        table = position_table(config.positions, self.grid, config.width, config.position_base, origin)
        self.positions = table.to(self.positions)

    def forward(
        self, tokens: Tensor, index: Tensor, *, intermediates: Sequence[int] = (), final: bool = True
    ) -> EncoderOutput:
        """Encode normalised pixel tokens (B, K, P) at grid positions `index` (B, K).

        `intermediates`: blocks, numbered from 1, whose outputs are returned. With final=False, blocks after the
        last intermediate are skipped.
        """
        x = self.patch_embed(tokens) + self.positions[index]  # (B, K, D)
        if self.class_token is not None:
            x = torch.cat(
                [self.class_token.expand(x.shape[0], -1, -1), x], dim=1
            )  # its position embedding is zero, as in MAE
        first = x.shape[1] - index.shape[1]
        kept: dict[int, Tensor] = {}
        last = len(self.blocks) if final else max(intermediates, default=0)
        for number, block in enumerate(self.blocks[:last], start=1):
            x = block(x)
            if number in intermediates:
                kept[number] = x[:, first:]
        return EncoderOutput(self.norm(x) if final else None, [kept[number] for number in intermediates])
