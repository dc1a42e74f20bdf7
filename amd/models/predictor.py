"""Predict hidden tokens from visible tokens: the decoder predicts pixels, a generator predicts teacher features.

Does not depend on masking strategies or losses.
Shapes: B batch, K visible tokens, Q query tokens, D width, E teacher width, P pixel values per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amd.config import DecoderConfig, EncoderConfig, TokenGrid
from amd.models.layers import LAYER_NORM_EPS, Block, init_like_torch, init_token, init_weights
from amd.tokens import position_table


class Predictor(nn.Module):
    """Transformer blocks over visible tokens and mask tokens (queries); the last block outputs only the queries."""

    positions: Tensor

    def __init__(self, encoder: EncoderConfig, grid: TokenGrid, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, encoder.mlp_ratio) for _ in range(depth))
        table = position_table(encoder.positions, grid, width, encoder.position_base)
        self.register_buffer("positions", table, persistent=False)  # (N, D)
        init_weights(self, encoder.init)
        init_token(self.mask_token, encoder.init)

    def forward(
        self, visible: Tensor, visible_index: Tensor, query_index: Tensor, *, return_visible: bool = False
    ) -> Tensor:
        """Predict features of the queries: (B, [1 +] K, D), (B, K), (B, Q) -> (B, Q, D).

        A class token may precede the visible tokens. With `return_visible`, the result is (B, [1 +] K + Q, D), visible
        tokens first.
        """
        extra = visible.shape[1] - visible_index.shape[1]
        positions = self.positions[visible_index]
        if extra:  # the position embedding of a class token is zero, as in MAE
            positions = torch.cat(
                [positions.new_zeros(positions.shape[0], extra, positions.shape[2]), positions], dim=1
            )
        queries = self.mask_token + self.positions[query_index]  # (B, Q, D)
        x = torch.cat([visible + positions, queries], dim=1)  # (B, [1 +] K + Q, D)
        for block in self.blocks[:-1]:
            x = block(x)
        out: Tensor = self.blocks[-1](x, None if return_visible else query_index.shape[1])
        return out


class Decoder(Predictor):
    """Predicts pixels at hidden tokens from the encoded visible tokens."""

    def __init__(self, encoder: EncoderConfig, config: DecoderConfig, grid: TokenGrid, token_values: int) -> None:
        super().__init__(encoder, grid, config.width, config.depth, config.heads)
        self.input = nn.Linear(encoder.width, config.width, bias=config.input_bias)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.width, token_values)
        for part in (self.input, self.norm, self.head):
            init_weights(part, encoder.init)
        if encoder.init == "videomae":
            init_like_torch(self.input)

    def forward(
        self, visible: Tensor, visible_index: Tensor, query_index: Tensor, *, return_visible: bool = False
    ) -> Tensor:
        """Predict pixels in the format of the pixel targets: (B, [1 +] K, D), (B, K), (B, Q) -> (B, Q, P)."""
        predicted = super().forward(self.input(visible), visible_index, query_index, return_visible=return_visible)
        pixels: Tensor = self.head(self.norm(predicted))
        return pixels


class Generator(Predictor):
    """Predicts teacher features. Its blocks may be narrower or wider than the teacher; in AMD, both have the same
    width."""

    def __init__(
        self, encoder: EncoderConfig, grid: TokenGrid, teacher_width: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__(encoder, grid, width, depth, heads)
        self.input = nn.Linear(teacher_width, width, bias=False)  # no bias, like the projection before it
        self.output = nn.Linear(width, teacher_width)
        for part in (self.input, self.output):
            init_weights(part, encoder.init)

    def forward(
        self, visible: Tensor, visible_index: Tensor, query_index: Tensor, *, return_visible: bool = False
    ) -> Tensor:
        """Predict the teacher's features: (B, K, E), (B, K), (B, Q) -> (B, Q, E)."""
        features: Tensor = self.output(
            super().forward(self.input(visible), visible_index, query_index, return_visible=return_visible)
        )
        return features
