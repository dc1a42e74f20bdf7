"""What is compared: pixel targets, alignment distances, and the three loss terms. Pure functions, always in float32.

Shapes: B batch, K tokens, P pixel values a token, D width.
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
    """Scalars; `total` carries the weights, the others do not."""

    total: Tensor
    reconstruction: Tensor
    direct: Tensor
    generation: Tensor


def unit_pixels(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """Pixels in [0, 1] from tokens of uint8 values, or of float values that are already normalised."""
    if tokens.dtype == torch.uint8:
        return tokens.float() / 255
    mean, std = _colours(tokens, clip)
    return tokens * std + mean


def normalized_pixels(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """What a network sees: (pixel - mean) / std per colour. Float tokens are taken as normalised already."""
    if tokens.dtype != torch.uint8:
        return tokens
    mean, std = _colours(tokens, clip)
    return (tokens.float() / 255 - mean) / std


def _colours(tokens: Tensor, clip: ClipConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation laid out along P, where colour varies fastest."""
    dtype = tokens.dtype if tokens.is_floating_point() else torch.float32
    return _laid_out(clip.mean, clip.std, tokens.shape[-1], dtype, tokens.device)


@cache  # copied to the device once, not in every step
def _laid_out(
    mean: tuple[float, ...], std: tuple[float, ...], values: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    repeats = values // 3
    return torch.tensor(mean * repeats, dtype=dtype, device=device), torch.tensor(
        std * repeats, dtype=dtype, device=device
    )


def pixel_targets(tokens: Tensor, clip: ClipConfig, kind: PixelTarget) -> Tensor:
    """What the decoder should answer for tokens of uint8 or normalised float pixels. (B, K, P) -> (B, K, P).

    per_channel: VideoMAE, over the token's pixels of one colour in [0, 1], epsilon outside the root.
    per_patch: MAE, over all values of the token as the network sees them, epsilon inside the root.
    Both take the unbiased variance.
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


def rebuilt_pixels(answers: Tensor, original: Tensor, clip: ClipConfig, kind: PixelTarget) -> Tensor:
    """The inverse of `pixel_targets`: a decoder's answers as pixels in [0, 1], not cut off. (B, K, P) -> (B, K, P).

    Targets that are normalised per token have lost its mean and spread: those of the `original` tokens are put back,
    as in MAE's demonstration. So they show structure that was rebuilt, in brightness and contrast that were given.
    """
    if kind == "unit":
        return answers
    if kind == "normalized":
        return unit_pixels(answers, clip)
    if kind == "per_patch":
        variance, mean = torch.var_mean(normalized_pixels(original, clip), dim=-1, keepdim=True)
        return unit_pixels(answers * (variance + 1e-6).sqrt() + mean, clip)
    variance, mean = torch.var_mean(unit_pixels(original, clip).unflatten(-1, (-1, 3)), dim=-2, keepdim=True)
    unit: Tensor = (answers.unflatten(-1, (-1, 3)) * (variance.sqrt() + 1e-6) + mean).flatten(-2)
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
    """Distance between student and teacher features, reduced over layer pairs. Lists of (B, K, D) -> scalar."""
    distance = DISTANCES[objective.distance]
    losses = []
    for prediction, target in zip(predictions, targets, strict=True):
        prediction, target = _full(prediction), _full(target)
        if objective.target_norm == "layer_norm":
            target = functional.layer_norm(target, target.shape[-1:], eps=1e-6)
        elif objective.target_norm == "l2":
            prediction, target = functional.normalize(prediction, dim=-1), functional.normalize(target, dim=-1)
        losses.append(distance(prediction, target, objective))
    return REDUCTIONS[objective.reduction](torch.stack(losses))


REDUCTIONS: dict[Reduction, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum}


def reconstruction(rebuilt: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over rebuilt tokens; always l2, as in AMD."""
    return functional.mse_loss(_full(rebuilt), targets)


def _full(values: Tensor) -> Tensor:
    """At least float32: autocast hands over half precision, parity tests float64."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def weigh(reconstruction: Tensor, direct: Tensor, generation: Tensor, objective: ObjectiveConfig) -> LossTerms:
    weights = objective.weights
    total = weights.reconstruction * reconstruction + weights.direct * direct + weights.generation * generation
    return LossTerms(total, reconstruction, direct, generation)
