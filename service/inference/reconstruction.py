"""What one request has masked and rebuilt. It goes through the model's thread as an encoder does, in its own batches.

Shapes: B clips of a batch, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amd.device import autocast
from amd.reconstruction import Reconstruction, draw_mask, reconstruct
from service.inference.model import Loaded, Outputs, Plan
from service.inference.options import NotPossible, Want


class Rebuilt(NamedTuple):
    """What became of one clip."""

    original: Tensor  # (3, T, H, W) uint8
    masked: Tensor  # (3, T, H, W) uint8
    rebuilt: Tensor  # (3, T, H, W) float32 in [0, 1]
    loss: float


class Rebuilding:
    def __init__(self, loaded: Loaded, want: Want) -> None:
        """Raises NotPossible where the mask leaves nothing to see or nothing to rebuild."""
        described = loaded.card.decoder
        assert described is not None, "planned: its decoder is there"
        assert loaded.decoder is not None, "planned: its decoder is there"
        self._loaded, self._decoder, self._pixels = loaded, loaded.decoder, described.pixels
        self._ratio = described.mask_ratio if want.mask_ratio is None else want.mask_ratio
        try:
            self._mask = draw_mask(described.mask_strategy, self._ratio, loaded.encoder.grid, want.seed)
        except ValueError as error:
            raise NotPossible(f"mask_ratio: {error}") from None
        self.tokens, self.device = loaded.tokens, loaded.device

    @torch.inference_mode()
    def forward(self, clips: Sequence[Tensor], outputs: Outputs) -> tuple[Tensor, Reconstruction]:
        """Clips (3, T, H, W) uint8 as one batch, and what was rebuilt of them; `outputs` are of embeddings."""
        loaded = self._loaded
        batch = loaded.on_device(clips)
        with autocast(loaded.precision, self.device):
            found = reconstruct(loaded.encoder, self._decoder, batch, self._mask, loaded.card.clip, self._pixels)
        return batch, found

    @torch.inference_mode()
    def collect(self, batch: tuple[Tensor, Reconstruction]) -> list[Rebuilt]:
        clips, found = batch
        pictures = zip(clips.cpu(), found.seen.cpu(), found.rebuilt.cpu(), found.losses.tolist(), strict=True)
        return [Rebuilt(*each) for each in pictures]

    def finish(self, plan: Plan, seen: Sequence[Rebuilt]) -> dict[str, Any]:
        """An item's answer; it has one clip."""
        (one,) = seen
        return {
            "mask_ratio": self._ratio,
            "seed": plan.want.seed,
            "visible": self._mask.visible.tolist(),
            "loss": one.loss,
            "original": one.original.numpy(),
            "masked": one.masked.numpy(),
            "rebuilt": one.rebuilt.numpy(),
        }
