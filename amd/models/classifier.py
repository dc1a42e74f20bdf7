"""An encoder with a linear head, as trained by fine-tuning.

The encoder's last norm applies to the mean of the tokens (the official fc_norm), not to each token.
Shapes: B batch, K tokens, P pixel values per token, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amd.config import EncoderConfig, TokenGrid
from amd.models.encoder import Encoder

HEAD_STD = 0.02


class EncoderWithHead(nn.Module):
    """Encoder, dropout and a linear head. Subclasses define the input of the head."""

    def __init__(
        self,
        config: EncoderConfig,
        grid: TokenGrid,
        token_values: int,
        classes: int,
        *,
        dropout: float = 0.0,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(config, grid, token_values)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(config.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)


class Classifier(EncoderWithHead):
    """Encoder, mean pooling, norm, dropout and a linear head."""

    def forward(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Return logits (B, C) for normalised pixel tokens (B, K, P) at grid positions `index` (B, K)."""
        logits: Tensor = self.head(self.dropout(self.features(tokens, index)))
        return logits

    def features(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Return the normalised mean of all tokens except the class token, (B, D)."""
        last = len(self.encoder.blocks)
        pooled = self.encoder(tokens, index, intermediates=(last,), final=False).intermediates[0].mean(dim=1)
        normed: Tensor = self.encoder.norm(pooled)
        return normed
