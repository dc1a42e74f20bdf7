from __future__ import annotations

import pytest
import torch

from amd.training.trainer.collapse_guard import feature_health, warning


def test_independent_features_have_nearly_full_rank_and_wide_spread() -> None:
    torch.manual_seed(0)
    health = feature_health(torch.randn(512, 16))
    assert health.rank > 0.95
    assert health.spread == pytest.approx(1.0, abs=0.05)
    assert warning(health, 10, 0.02) is None


def test_collinear_features_have_rank_one() -> None:
    torch.manual_seed(0)
    health = feature_health(torch.randn(64, 1) * torch.randn(1, 16))
    assert health.rank == pytest.approx(1 / 16, rel=0.01)
    assert "step 10" in (warning(health, 10, 0.1) or "")


def test_identical_features_have_no_spread_and_trigger_a_warning() -> None:
    health = feature_health(torch.ones(8, 4))
    assert health == (0.0, 0.0)
    assert "collapsing" in (warning(health, 10, 0.0) or "")


def test_the_rank_of_few_samples_is_relative_to_the_largest_possible_rank() -> None:
    assert feature_health(torch.eye(4, 64)).rank == pytest.approx(1.0, abs=1e-4)
