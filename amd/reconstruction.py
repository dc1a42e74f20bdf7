"""Reconstruct masked clips with an encoder and its decoder. Accesses no files.

Shapes: B batch, T frames, H height, W width, N tokens, P pixel values per token, V visible, M hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amd.config import ClipConfig, MaskConfig, MaskStrategy, PixelTarget, TokenGrid
from amd.losses import normalized_pixels, pixel_targets, reconstructed_pixels, unit_pixels
from amd.masks import sample_token_sets
from amd.models.encoder import Encoder
from amd.models.predictor import Decoder
from amd.tokens import patchify, put_tokens, take_tokens, unpatchify

HIDDEN = (222, 218, 209)  # RGB colour of hidden tokens


class MaskedTokens(NamedTuple):
    """Visible and hidden token indices, ascending."""

    visible: Tensor  # (V,)
    hidden: Tensor  # (M,)


class Reconstruction(NamedTuple):
    """Masked and reconstructed clips of a batch, and the losses."""

    masked: Tensor  # (B, 3, T, H, W) uint8, hidden tokens painted over
    reconstructed: Tensor  # (B, 3, T, H, W) float32 in [0, 1]; the clip at visible tokens, predictions elsewhere
    losses: Tensor  # (B,) mean squared error over hidden tokens, against the pixel targets of training
    token_losses: Tensor  # (B, M) mean squared error of each hidden token


def draw_mask(strategy: MaskStrategy, ratio: float, grid: TokenGrid, seed: int) -> MaskedTokens:
    """Sample a mask as in training. The same seed and ratio always produce the same mask.

    Raises ValueError if the ratio leaves no visible or no hidden tokens.
    """
    if not 0 <= ratio < 1:
        raise ValueError(
            f"a mask ratio of {ratio:g} is out of range: use at least 0 and less than 1, so that tokens are visible"
        )
    mask = MaskConfig(strategy=strategy, student_ratio=ratio, teacher_ratio=ratio)
    sets = sample_token_sets(mask, grid, 1, torch.Generator().manual_seed(seed))
    masked = MaskedTokens(sets.student_visible[0], sets.student_masked[0])
    if not len(masked.hidden) or not len(masked.visible):
        purpose = "see" if len(masked.hidden) else "reconstruct"
        raise ValueError(
            f"a mask ratio of {ratio:g} ({strategy} masking) leaves none of the {grid.tokens} tokens to {purpose}"
        )
    return masked


def reconstruct(
    encoder: Encoder, decoder: Decoder, clips: Tensor, masked: MaskedTokens, clip: ClipConfig, kind: PixelTarget
) -> Reconstruction:
    """Hide the same tokens in all clips, (B, 3, T, H, W) uint8, and reconstruct them."""
    visible, hidden = (index.to(clips.device).expand(len(clips), -1) for index in masked)
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (B, N, P) uint8
    encoded = encoder(normalized_pixels(take_tokens(pixels, visible), clip), visible).final
    predictions = decoder(encoded, visible, hidden).float()  # (B, M, P)
    original = take_tokens(pixels, hidden)
    errors = (predictions - pixel_targets(original, clip, kind)).square()  # (B, M, P)
    reconstructed = reconstructed_pixels(predictions, original, clip, kind).clamp(0, 1)
    return Reconstruction(
        as_clips(cover_hidden(pixels, visible, clip), clip),
        as_clips(put_tokens(unit_pixels(pixels, clip), hidden, reconstructed), clip),
        errors.mean(dim=(1, 2)),
        errors.mean(dim=2),
    )


def cover_hidden(pixels: Tensor, visible: Tensor, clip: ClipConfig) -> Tensor:
    """Paint over all hidden tokens: (B, N, P) and (B, V) -> (B, N, P) uint8."""
    colour = torch.tensor(HIDDEN, dtype=torch.uint8, device=pixels.device)
    blank = colour.repeat(clip.token_values // 3).expand_as(pixels)
    return put_tokens(blank, visible, take_tokens(pixels, visible))


def as_clips(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """Convert tokens to clips: (B, N, P) -> (B, 3, T, H, W)."""
    return unpatchify(tokens, clip.grid, clip.tubelet, clip.patch)
