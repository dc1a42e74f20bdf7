"""Mask and reconstruct the clips of one request. Implements the batcher's Network protocol.

Shapes: B clips per batch, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amd.device import autocast
from amd.reconstruction import Reconstruction, draw_mask, reconstruct
from service.inference.model import InferencePlan, LoadedEncoder, RequestedOutputs
from service.inference.options import InferenceOptions
from service.web.errors import Refusal


class ClipReconstruction(NamedTuple):
    """Reconstruction of one clip."""

    original: Tensor  # (3, T, H, W) uint8
    masked: Tensor  # (3, T, H, W) uint8
    reconstructed: Tensor  # (3, T, H, W) float32 in [0, 1]
    loss: float


class ReconstructionNetwork:
    """An encoder and its decoder, applied with the mask of one request."""

    def __init__(self, loaded: LoadedEncoder, options: InferenceOptions) -> None:
        """Sample the mask. Raises Refusal if it leaves no visible or no hidden tokens."""
        described = loaded.card.decoder
        assert described is not None, "the plan checks for a decoder"
        assert loaded.decoder is not None, "the plan checks for a decoder"
        self._loaded, self._decoder, self._pixels = loaded, loaded.decoder, described.pixels
        self._ratio = described.mask_ratio if options.mask_ratio is None else options.mask_ratio
        try:
            self._mask = draw_mask(described.mask_strategy, self._ratio, loaded.encoder.grid, options.seed)
        except ValueError as error:
            raise Refusal("not_possible", f"mask_ratio: {error}") from None
        self.tokens, self.device = loaded.tokens, loaded.device

    @torch.inference_mode()
    def forward(self, clips: Sequence[Tensor], outputs: RequestedOutputs) -> tuple[Tensor, Reconstruction]:
        """Reconstruct clips (3, T, H, W) uint8 as one batch. `outputs` applies only to embeddings and is ignored."""
        loaded = self._loaded
        batch = loaded.on_device(clips)
        with autocast(loaded.precision, self.device):
            found = reconstruct(loaded.encoder, self._decoder, batch, self._mask, loaded.card.clip, self._pixels)
        return batch, found

    @torch.inference_mode()
    def collect(self, batch: tuple[Tensor, Reconstruction]) -> list[ClipReconstruction]:
        clips, found = batch
        pictures = zip(clips.cpu(), found.masked.cpu(), found.reconstructed.cpu(), found.losses.tolist(), strict=True)
        return [ClipReconstruction(*each) for each in pictures]

    def item_result(self, plan: InferencePlan, clips: Sequence[ClipReconstruction]) -> dict[str, Any]:
        """Return the result for an item, which has exactly one clip."""
        (one,) = clips
        return {
            "mask_ratio": self._ratio,
            "seed": plan.options.seed,
            "visible": self._mask.visible.tolist(),
            "loss": one.loss,
            "original": one.original.numpy(),
            "masked": one.masked.numpy(),
            "rebuilt": one.reconstructed.numpy(),
        }
