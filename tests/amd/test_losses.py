from __future__ import annotations

from typing import get_args

import pytest
import torch

from amd.config import ClipConfig, Distance, ObjectiveConfig, PixelTarget, Reduction, TargetNorm
from amd.losses import DISTANCES, alignment, normalized_pixels, pixel_targets, token_alignment, unit_pixels

CLIP = ClipConfig(frames=4, size=16, patch=4, tubelet=2)


def test_every_configurable_distance_is_implemented() -> None:
    assert set(DISTANCES) == set(get_args(Distance))


def test_bytes_and_normalised_floats_yield_the_same_pixels() -> None:
    tokens = torch.randint(0, 256, (2, 5, CLIP.token_values), dtype=torch.uint8)
    normalized = normalized_pixels(tokens, CLIP)
    torch.testing.assert_close(unit_pixels(normalized, CLIP), tokens.float() / 255, rtol=1e-5, atol=1e-6)
    for kind in get_args(PixelTarget):
        torch.testing.assert_close(
            pixel_targets(tokens, CLIP, kind), pixel_targets(normalized, CLIP, kind), rtol=1e-3, atol=1e-4
        )


def test_per_channel_targets_have_zero_mean_and_unit_standard_deviation_per_colour() -> None:
    tokens = torch.randint(0, 256, (2, 5, CLIP.token_values), dtype=torch.uint8)
    pixels = pixel_targets(tokens, CLIP, "per_channel").reshape(2, 5, -1, 3)
    torch.testing.assert_close(pixels.mean(dim=-2), torch.zeros(2, 5, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels.std(dim=-2), torch.ones(2, 5, 3), rtol=0, atol=1e-4)


def test_per_patch_targets_are_normalised_jointly_over_all_colours() -> None:
    tokens = torch.randint(0, 256, (2, 5, CLIP.token_values), dtype=torch.uint8)
    pixels = pixel_targets(tokens, CLIP, "per_patch")
    torch.testing.assert_close(pixels.mean(dim=-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    assert pixels.reshape(2, 5, -1, 3).mean(dim=-2).abs().max() > 1e-2  # colours keep their differences


def test_a_single_colour_token_has_finite_targets() -> None:
    tokens = torch.full((1, 1, CLIP.token_values), 77, dtype=torch.uint8)
    for kind in get_args(PixelTarget):
        assert pixel_targets(tokens, CLIP, kind).isfinite().all()
    assert pixel_targets(tokens, CLIP, "per_channel").abs().max() == 0


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "l2"])
def test_alignment_is_zero_for_equal_features_and_positive_otherwise(distance: Distance, norm: str) -> None:
    objective = ObjectiveConfig(distance=distance, target_norm=norm)  # type: ignore[arg-type]
    target = torch.randn(2, 5, 8)
    same = torch.nn.functional.layer_norm(target, (8,), eps=1e-6) if norm == "layer_norm" else target
    assert alignment([same], [target], objective) == 0
    assert alignment([same + 1], [target], objective) > 0


def test_the_sum_over_layers_equals_the_mean_times_the_number_of_layers() -> None:
    pairs = [torch.randn(2, 5, 8) for _ in range(3)], [torch.randn(2, 5, 8) for _ in range(3)]
    mean = alignment(*pairs, ObjectiveConfig(reduction="mean"))
    torch.testing.assert_close(alignment(*pairs, ObjectiveConfig(reduction="sum")), 3 * mean)


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("norm", get_args(TargetNorm))
@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_the_mean_over_tokens_is_the_alignment_of_all_tokens(
    distance: Distance, norm: TargetNorm, reduction: Reduction
) -> None:
    objective = ObjectiveConfig(distance=distance, target_norm=norm, reduction=reduction)
    ours, theirs = ([torch.randn(2, 5, 8) for _ in range(3)] for _ in range(2))
    tokens = token_alignment(ours, theirs, objective)
    assert tokens.shape == (2, 5)
    torch.testing.assert_close(tokens.mean(), alignment(ours, theirs, objective))
    alone = [[features[1:, 3:4] for features in side] for side in (ours, theirs)]
    torch.testing.assert_close(tokens[1, 3], alignment(*alone, objective))


def test_l2_normalised_alignment_ignores_feature_norms() -> None:
    objective = ObjectiveConfig(distance="l1", target_norm="l2")
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(alignment([a], [b], objective), alignment([7 * a], [3 * b], objective))


def test_smooth_l1_uses_the_configured_beta() -> None:
    a, b = torch.zeros(1, 1, 4), torch.full((1, 1, 4), 0.5)
    assert alignment([a], [b], ObjectiveConfig(distance="smooth_l1")) == pytest.approx(0.125)
    assert alignment([a], [b], ObjectiveConfig(distance="smooth_l1", smooth_l1_beta=0.25)) == pytest.approx(0.375)
