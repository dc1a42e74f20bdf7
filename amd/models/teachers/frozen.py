"""The frozen teacher: an encoder in eval mode, run up to its last aligned block, neither trained nor checkpointed.

Shapes: B batch, K teacher-visible tokens, E teacher width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from amd.models.encoder import Encoder


class FeatureTeacher(Protocol):
    """Interface for teachers in distillation; any model can implement it."""

    def __call__(self, tokens: Tensor, index: Tensor) -> list[Tensor]: ...


class Teacher(nn.Module):
    """Frozen encoder that returns intermediates of the aligned blocks."""

    def __init__(self, encoder: Encoder, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.blocks = blocks
        super().train(False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Teacher:
        """Ignore `mode` and stay in eval mode."""
        return self

    @torch.inference_mode()
    def forward(self, tokens: Tensor, index: Tensor) -> list[Tensor]:
        """Return the residual stream after each aligned block: (B, K, P) at `index` (B, K) -> (B, K, E) per block."""
        features: list[Tensor] = self.encoder(tokens, index, intermediates=self.blocks, final=False).intermediates
        return features

    def cast_linear_layers(self, dtype: torch.dtype) -> Teacher:
        """Store the weights of linear layers in the dtype that autocast computes in.

        This halves the memory and avoids a cast in every step, without changing results. Norms, tokens and the residual
        stream stay in float32.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self
