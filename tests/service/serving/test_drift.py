"""Tests for drift statistics on synthetic embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from service.serving.drift import NEIGHBOURS, Drift


def pairs(count: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


def test_scaling_or_rotating_embeddings_causes_no_drift() -> None:
    vectors = pairs(40)
    rotated = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0].astype(np.float32)
    for other, cosine in ((vectors, 1.0), (vectors * 3, 1.0), (vectors @ rotated, None)):
        drift = Drift()
        for one, two in zip(vectors, other, strict=True):
            drift.add(one, two)
        found = drift.report()
        assert found["neighbours_kept"] == 1.0
        if cosine is not None:
            assert found["cosine_min"] == pytest.approx(cosine, abs=1e-5)


def test_random_vectors_share_neighbours_at_chance_level() -> None:
    drift = Drift()
    for one, two in zip(pairs(200), np.random.default_rng(2).normal(size=(200, 8)), strict=True):
        drift.add(one, two)
    found = drift.report()
    assert found["neighbours_kept"] == pytest.approx(NEIGHBOURS / 199, abs=0.02)
    assert abs(found["cosine_mean"]) < 0.1


def test_cosines_require_equal_widths_and_neighbours_require_enough_items() -> None:
    drift = Drift()
    assert drift.report()["items"] == 0
    for vector in pairs(NEIGHBOURS):
        drift.add(vector, vector[:4])
    found = drift.report()
    assert (found["cosine_mean"], found["neighbours_kept"]) == (None, None)
