"""The collapse guard: check that the student's features still distinguish samples, even while the loss is decreasing.

Shapes: n samples, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from amd.config import TrainConfig
from amd.losses import normalized_pixels
from amd.models.encoder import Encoder
from amd.tokens import TokenSets, patchify, take_tokens

MIN_SPREAD = 1e-3  # features that vary by less than a thousandth of their RMS are collapsed


class FeatureHealth(NamedTuple):
    rank: float
    """Effective rank (exponential of the entropy of the normalised singular values) as a fraction of the maximum."""
    spread: float
    """Standard deviation over samples, divided by the RMS of the features."""


@torch.no_grad()
def student_features(encoder: Encoder, clips: Tensor, sets: TokenSets, config: TrainConfig) -> Tensor:
    """Average the last block's features over the student-visible tokens: (n, D) float32."""
    pixels = take_tokens(patchify(clips, config.clip.tubelet, config.clip.patch), sets.student_visible)
    depth = config.student.encoder.depth
    visible = normalized_pixels(pixels, config.clip)
    encoded = encoder(visible, sets.student_visible, intermediates=(depth,), final=False)
    return nn.functional.layer_norm(encoded.intermediates[0].float(), (config.student.encoder.width,)).mean(dim=1)


def feature_health(features: Tensor) -> FeatureHealth:
    """Compute the effective rank of features (n, D) as a fraction of min(n - 1, D), and their relative spread."""
    centred = features - features.mean(dim=0)
    values = torch.linalg.svdvals(centred)
    total = values.sum()
    most = min(features.shape[0] - 1, features.shape[1])
    size = features.square().mean().sqrt()
    spread = centred.square().mean().sqrt() / size.clamp_min(1e-12)
    if most < 1 or total <= 1e-12:
        return FeatureHealth(0.0, float(spread))
    shares = values / total
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return FeatureHealth(float(entropy.exp()) / most, float(spread))


def warning(health: FeatureHealth, step: int, min_rank: float) -> str | None:
    """Return a warning that explains how to fix the collapse, or None while the features are healthy."""
    if health.rank >= min_rank and health.spread >= MIN_SPREAD:
        return None
    return (
        f"step {step}: the student's features are collapsing (effective rank {health.rank:.3f}, minimum "
        f"{min_rank}; spread {health.spread:.2g}, minimum {MIN_SPREAD}). Stop and lower optim.base_lr, lengthen the "
        "warm-up, set optim.clip_norm, or raise objective.weights.reconstruction"
    )
