"""A masked clip rebuilt: what an encoder saw, and what its decoder made of the rest, as pictures.

Knows nothing of runs, files or requests.
Shapes: B batch, T frames, H height, W width, N tokens, P pixel values a token, V visible, M hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amd.config import ClipConfig, MaskConfig, MaskStrategy, PixelTarget, TokenGrid
from amd.losses import normalized_pixels, pixel_targets, rebuilt_pixels, unit_pixels
from amd.masks import sample_token_sets
from amd.models.encoder import Encoder
from amd.models.predictor import Decoder
from amd.tokens import patchify, put_tokens, take_tokens, unpatchify

HIDDEN = (222, 218, 209)  # of a token that nobody showed


class Masked(NamedTuple):
    """Which tokens are seen and which are rebuilt, ascending."""

    visible: Tensor  # (V,)
    hidden: Tensor  # (M,)


class Reconstruction(NamedTuple):
    seen: Tensor  # (B, 3, T, H, W) uint8, hidden tokens painted over
    rebuilt: Tensor  # (B, 3, T, H, W) float32 in [0, 1]; the clip where it was seen, the decoder's answer elsewhere
    losses: Tensor  # (B,) mean squared error over hidden tokens, as the objective compares them


def draw_mask(strategy: MaskStrategy, ratio: float, grid: TokenGrid, seed: int) -> Masked:
    """The one mask of a seed and a ratio, drawn as in training; counts are exact.

    Raises ValueError where the ratio leaves nothing to see or nothing to rebuild.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"a mask ratio of {ratio:g} must be at least 0 and below 1: some tokens are seen")
    mask = MaskConfig(strategy=strategy, student_ratio=ratio, teacher_ratio=ratio)
    sets = sample_token_sets(mask, grid, 1, torch.Generator().manual_seed(seed))
    found = Masked(sets.student_visible[0], sets.student_masked[0])
    if not len(found.hidden) or not len(found.visible):
        what = "see" if len(found.hidden) else "rebuild"
        raise ValueError(
            f"a mask ratio of {ratio:g} ({strategy} masking) leaves none of {grid.tokens} tokens to {what}"
        )
    return found


def reconstruct(
    encoder: Encoder, decoder: Decoder, clips: Tensor, masked: Masked, clip: ClipConfig, kind: PixelTarget
) -> Reconstruction:
    """Hide the same tokens of all clips (B, 3, T, H, W) uint8, and have them rebuilt."""
    visible, hidden = (index.to(clips.device).expand(len(clips), -1) for index in masked)
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (B, N, P) uint8
    encoded = encoder(normalized_pixels(take_tokens(pixels, visible), clip), visible).final
    answers = decoder(encoded, visible, hidden).float()  # (B, M, P)
    original = take_tokens(pixels, hidden)
    losses = (answers - pixel_targets(original, clip, kind)).square().mean(dim=(1, 2))
    shown = rebuilt_pixels(answers, original, clip, kind).clamp(0, 1)
    return Reconstruction(
        as_clips(painted(pixels, visible, clip), clip),
        as_clips(put_tokens(unit_pixels(pixels, clip), hidden, shown), clip),
        losses,
    )


def painted(pixels: Tensor, visible: Tensor, clip: ClipConfig) -> Tensor:
    """All tokens but the visible ones as blank paper, (B, N, P) uint8."""
    paper = torch.tensor(HIDDEN, dtype=torch.uint8, device=pixels.device)
    blank = paper.repeat(clip.token_values // 3).expand_as(pixels)
    return put_tokens(blank, visible, take_tokens(pixels, visible))


def as_clips(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """(B, N, P) -> (B, 3, T, H, W)."""
    return unpatchify(tokens, clip.grid, clip.tubelet, clip.patch)
