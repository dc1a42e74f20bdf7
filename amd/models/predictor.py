"""Predictors fill in hidden tokens from seen ones: the decoder answers in pixels, a generator in teacher features.

Shapes: B batch, K seen tokens, A asked tokens, D width, E teacher width, P pixel values a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amd.config import DecoderConfig, EncoderConfig, TokenGrid
from amd.models.layers import LAYER_NORM_EPS, Block, init_like_torch, init_token, init_weights
from amd.tokens import position_table


class Predictor(nn.Module):
    """Blocks over [seen tokens, mask tokens at the asked places]; the last block computes only the asked ones."""

    positions: Tensor

    def __init__(self, encoder: EncoderConfig, grid: TokenGrid, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, encoder.mlp_ratio) for _ in range(depth))
        table = position_table(encoder.positions, grid, width, encoder.position_base)
        self.register_buffer("positions", table, persistent=False)  # (N, D)
        init_weights(self, encoder.init)
        init_token(self.mask_token, encoder.init)

    def forward(self, seen: Tensor, seen_index: Tensor, asked_index: Tensor, *, return_seen: bool = False) -> Tensor:
        """(B, [1 +] K, D), (B, K), (B, A) -> (B, A, D); a class token may stand before the seen tokens.

        With `return_seen` the answer is (B, [1 +] K + A, D), the seen tokens first.
        """
        extra = seen.shape[1] - seen_index.shape[1]
        places = self.positions[seen_index]
        if extra:  # a class token stands nowhere: its position is zero, as in MAE
            places = torch.cat([places.new_zeros(places.shape[0], extra, places.shape[2]), places], dim=1)
        asked = self.mask_token + self.positions[asked_index]  # (B, A, D)
        x = torch.cat([seen + places, asked], dim=1)  # (B, [1 +] K + A, D)
        for block in self.blocks[:-1]:
            x = block(x)
        out: Tensor = self.blocks[-1](x, None if return_seen else asked_index.shape[1])
        return out


class Decoder(Predictor):
    """From the student's encoded tokens to pixels at hidden ones."""

    def __init__(self, encoder: EncoderConfig, config: DecoderConfig, grid: TokenGrid, token_values: int) -> None:
        super().__init__(encoder, grid, config.width, config.depth, config.heads)
        self.input = nn.Linear(encoder.width, config.width, bias=config.input_bias)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.width, token_values)
        for part in (self.input, self.norm, self.head):
            init_weights(part, encoder.init)
        if encoder.init == "videomae":
            init_like_torch(self.input)

    def forward(self, seen: Tensor, seen_index: Tensor, asked_index: Tensor, *, return_seen: bool = False) -> Tensor:
        """(B, [1 +] K, D), (B, K), (B, A) -> (B, A, P) pixels as the target has them."""
        predicted = super().forward(self.input(seen), seen_index, asked_index, return_seen=return_seen)
        pixels: Tensor = self.head(self.norm(predicted))
        return pixels


class Generator(Predictor):
    """Answers in teacher features by blocks of another width. Ours: AMD has the teacher's width alone."""

    def __init__(
        self, encoder: EncoderConfig, grid: TokenGrid, teacher_width: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__(encoder, grid, width, depth, heads)
        self.input = nn.Linear(teacher_width, width, bias=False)  # after a projection, which has none either
        self.output = nn.Linear(width, teacher_width)
        for part in (self.input, self.output):
            init_weights(part, encoder.init)

    def forward(self, seen: Tensor, seen_index: Tensor, asked_index: Tensor, *, return_seen: bool = False) -> Tensor:
        """(B, K, E), (B, K), (B, A) -> (B, A, E) features of the teacher."""
        features: Tensor = self.output(
            super().forward(self.input(seen), seen_index, asked_index, return_seen=return_seen)
        )
        return features
