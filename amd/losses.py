"""Pixel targets, alignment distances and the loss terms. Pure functions, computed in float32.

Shapes: B batch, K tokens, P pixel values per token, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from amd.config import ClipConfig, Distance, ObjectiveConfig, PixelTarget, Reduction


class LossTerms(NamedTuple):
    """Scalar loss terms; `total` is their weighted sum."""

    total: Tensor
    reconstruction: Tensor
    direct: Tensor
    generation: Tensor


def unit_pixels(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """Convert tokens of uint8 or normalised float pixels to pixels in [0, 1]."""
    if tokens.dtype == torch.uint8:
        return tokens.float() / 255
    mean, std = _channel_statistics(tokens, clip)
    return tokens * std + mean


def normalized_pixels(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """Normalise tokens of uint8 pixels with the mean and std of each channel; float tokens are already normalised."""
    if tokens.dtype != torch.uint8:
        return tokens
    mean, std = _channel_statistics(tokens, clip)
    return (tokens.float() / 255 - mean) / std


def _channel_statistics(tokens: Tensor, clip: ClipConfig) -> tuple[Tensor, Tensor]:
    """Return the per-channel mean and standard deviation, repeated along P, where the channel index varies fastest."""
    dtype = tokens.dtype if tokens.is_floating_point() else torch.float32
    return _repeated(clip.mean, clip.std, tokens.shape[-1], dtype, tokens.device)


@cache  # copied to the device once, not in every step
def _repeated(
    mean: tuple[float, ...], std: tuple[float, ...], values: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    repeats = values // 3
    return torch.tensor(mean * repeats, dtype=dtype, device=device), torch.tensor(
        std * repeats, dtype=dtype, device=device
    )


def pixel_targets(tokens: Tensor, clip: ClipConfig, kind: PixelTarget) -> Tensor:
    """Return the decoder's targets for tokens of uint8 or normalised float pixels: (B, K, P) -> (B, K, P).

    per_channel: as in VideoMAE, normalised over the pixels of one channel in [0, 1], with epsilon outside the square
    root.
    per_patch: as in MAE, normalised over all normalised pixels of the token, with epsilon inside the square root.
    Both use the unbiased variance.
    """
    if kind == "unit":
        return unit_pixels(tokens, clip)
    if kind == "normalized":
        return normalized_pixels(tokens, clip)
    if kind == "per_patch":
        pixels = normalized_pixels(tokens, clip)
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        return (pixels - mean) / (variance + 1e-6).sqrt()
    pixels = unit_pixels(tokens, clip).reshape(*tokens.shape[:-1], -1, 3)  # (B, K, P / 3, 3)
    variance, mean = torch.var_mean(pixels, dim=-2, keepdim=True)
    return ((pixels - mean) / (variance.sqrt() + 1e-6)).flatten(-2)


def reconstructed_pixels(predictions: Tensor, original: Tensor, clip: ClipConfig, kind: PixelTarget) -> Tensor:
    """Invert `pixel_targets`: convert predictions to pixel values on the [0, 1] scale, without clamping.

    (B, K, P) -> (B, K, P).

    Targets normalised per token do not contain the token's mean and standard deviation, so both are taken from the
    `original` tokens, as in MAE's demo: the prediction determines structure, but not brightness and contrast.
    """
    if kind == "unit":
        return predictions
    if kind == "normalized":
        return unit_pixels(predictions, clip)
    if kind == "per_patch":
        variance, mean = torch.var_mean(normalized_pixels(original, clip), dim=-1, keepdim=True)
        return unit_pixels(predictions * (variance + 1e-6).sqrt() + mean, clip)
    variance, mean = torch.var_mean(unit_pixels(original, clip).unflatten(-1, (-1, 3)), dim=-2, keepdim=True)
    unit: Tensor = (predictions.unflatten(-1, (-1, 3)) * (variance.sqrt() + 1e-6) + mean).flatten(-2)
    return unit


def l2(prediction: Tensor, target: Tensor, objective: ObjectiveConfig) -> Tensor:
    return functional.mse_loss(prediction, target)


def l1(prediction: Tensor, target: Tensor, objective: ObjectiveConfig) -> Tensor:
    return functional.l1_loss(prediction, target)


def smooth_l1(prediction: Tensor, target: Tensor, objective: ObjectiveConfig) -> Tensor:
    return functional.smooth_l1_loss(prediction, target, beta=objective.smooth_l1_beta)


DISTANCES: dict[Distance, Callable[[Tensor, Tensor, ObjectiveConfig], Tensor]] = {
    "l2": l2,
    "l1": l1,
    "smooth_l1": smooth_l1,
}


def alignment(predictions: list[Tensor], targets: list[Tensor], objective: ObjectiveConfig) -> Tensor:
    """Return the distance between student and teacher features, given as one (B, K, D) tensor per layer pair."""
    distance = DISTANCES[objective.distance]
    pairs = (_comparable(*pair, objective) for pair in zip(predictions, targets, strict=True))
    losses = [distance(prediction, target, objective) for prediction, target in pairs]
    return REDUCTIONS[objective.reduction](torch.stack(losses))


def token_alignment(predictions: list[Tensor], targets: list[Tensor], objective: ObjectiveConfig) -> Tensor:
    """Return the `alignment` of each token, (B, K), whose mean is the alignment of all tokens."""
    distance = DISTANCES[objective.distance]
    of_token = torch.func.vmap(lambda prediction, target: distance(prediction, target, objective))
    losses = []
    for pair in zip(predictions, targets, strict=True):
        prediction, target = _comparable(*pair, objective)
        losses.append(of_token(prediction.flatten(0, 1), target.flatten(0, 1)).unflatten(0, prediction.shape[:2]))
    return REDUCTIONS[objective.reduction](torch.stack(losses), dim=0)


def _comparable(prediction: Tensor, target: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Return features in at least float32, normalised as `target_norm` specifies."""
    prediction, target = _at_least_float32(prediction), _at_least_float32(target)
    if objective.target_norm == "layer_norm":
        target = functional.layer_norm(target, target.shape[-1:], eps=1e-6)
    elif objective.target_norm == "l2":
        prediction, target = functional.normalize(prediction, dim=-1), functional.normalize(target, dim=-1)
    return prediction, target


REDUCTIONS: dict[Reduction, Callable[..., Tensor]] = {"mean": torch.mean, "sum": torch.sum}


def reconstruction(reconstructed: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error over reconstructed tokens; the distance is always l2, as in AMD."""
    return functional.mse_loss(_at_least_float32(reconstructed), targets)


def _at_least_float32(values: Tensor) -> Tensor:
    """Convert half-precision tensors, as produced by autocast, to float32; keep float64, which parity tests use."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def weigh(reconstruction: Tensor, direct: Tensor, generation: Tensor, objective: ObjectiveConfig) -> LossTerms:
    """Return the loss terms with their weighted total."""
    weights = objective.weights
    total = weights.reconstruction * reconstruction + weights.direct * direct + weights.generation * generation
    return LossTerms(total, reconstruction, direct, generation)
