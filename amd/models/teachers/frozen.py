"""The frozen teacher: an encoder in eval mode, stopped after its last aligned block, never trained, never saved.

Shapes: B batch, K tokens the teacher sees, E teacher width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from amd.models.encoder import Encoder


class FeatureTeacher(Protocol):
    """What distillation needs of a teacher, whatever network stands behind it."""

    def __call__(self, tokens: Tensor, index: Tensor) -> list[Tensor]: ...


class Teacher(nn.Module):
    def __init__(self, encoder: Encoder, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.blocks = blocks
        super().train(False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode."""
        return self

    @torch.inference_mode()
    def forward(self, tokens: Tensor, index: Tensor) -> list[Tensor]:
        """Raw residual streams after the aligned blocks at tokens (B, K, P) that stand at `index`: (B, K, E) each."""
        features: list[Tensor] = self.encoder(tokens, index, intermediates=self.blocks, final=False).intermediates
        return features

    def multiply_in(self, dtype: torch.dtype) -> Teacher:
        """Store the weights of linear maps in the type that autocast multiplies them in anyway.

        The same numbers, half the memory, and no cast of every weight in every step. Norms, tokens and the residual
        stream stay in float32.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self
