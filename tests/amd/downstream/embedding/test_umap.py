"""Tests for the UMAP layout, which requires the `umap` extra. Kept apart because compiling UMAP takes many seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amd.downstream.embedding.layout import compute_map
from tests.amd.downstream.embedding.test_layout import blobs, write_vectors

pytest.importorskip("umap", reason="requires the umap extra")


def test_umap_keeps_groups_apart_and_is_deterministic(tmp_path: Path) -> None:
    spans = write_vectors(tmp_path, blobs(90, 16))
    first, second = (
        compute_map(str(tmp_path), spans, 90, encoder="small", layout="umap", clusters=3) for _ in range(2)
    )
    assert first == second
    assert (first.layout, first.explained_variance) == ("umap", None)
    positions = np.stack([first.x, first.y], axis=1)
    centers = np.stack([positions[group::3].mean(0) for group in range(3)])
    nearest = np.linalg.norm(positions[:, None] - centers, axis=2).argmin(1)
    assert (nearest == np.arange(90) % 3).all()
