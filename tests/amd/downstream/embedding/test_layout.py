"""Tests that the layout matches scikit-learn, is deterministic, and handles small and large sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from amd.config import ConfigError
from amd.downstream.embedding import layout
from amd.downstream.embedding.files import Vectors, plan_spans, unit, write_rows
from amd.downstream.embedding.layout import check_layout, cluster, compute_map, fit_projection
from amd.downstream.embedding.map_files import MAX_LOCATION


def blobs(count: int, width: int, centers: int = 3, seed: int = 0) -> Vectors:
    """Return unit vectors around a few random directions."""
    noise = np.random.default_rng(seed)
    directions = unit(noise.normal(size=(centers, width)).astype(np.float32))
    spread = noise.normal(size=(count, width)).astype(np.float32)
    return unit(directions[np.arange(count) % centers] + 0.05 * spread)


def write_vectors(output: Path, vectors: Vectors, rows_per_file: int = 7) -> list[range]:
    spans = list(plan_spans(len(vectors), rows_per_file))
    for span in spans:
        records = np.arange(span.start, span.stop)
        write_rows(str(output), span, vectors[records], records, records % 3 - 1, [f"/data/{one}" for one in records])
    return spans


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(3, 60),
    width=st.integers(2, 20),
    rows_per_file=st.integers(1, 60),
)
def test_the_projection_matches_scikit_learn_up_to_sign(seed: int, count: int, width: int, rows_per_file: int) -> None:
    noise = np.random.default_rng(seed)
    scales = 4.0 ** -np.arange(width)  # well-separated components
    vectors = (noise.normal(size=(count, width)) * scales + 1).astype(np.float32)
    peer = PCA(2, svd_solver="full").fit(vectors.astype(np.float64))
    projection = fit_projection(vectors[start : start + rows_per_file] for start in range(0, count, rows_per_file))
    found, expected = projection(vectors), peer.transform(vectors.astype(np.float64))
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(projection.explained_variance, peer.explained_variance_ratio_, rtol=1e-4, atol=1e-6)
    assert (projection.axes[np.arange(2), np.abs(projection.axes).argmax(1)] > 0).all()


@pytest.mark.parametrize(("count", "width"), [(1, 5), (4, 1), (2, 2)])
def test_sets_without_two_components_have_finite_positions(tmp_path: Path, count: int, width: int) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(count, width)).astype(np.float32))
    spans = write_vectors(tmp_path, vectors)
    found = compute_map(str(tmp_path), spans, count, encoder="small", layout="pca", clusters=10)
    assert len(found.x) == count
    assert np.isfinite([*found.x, *found.y, *found.score, *(found.explained_variance or ())]).all()


def test_clusters_match_well_separated_groups_and_outliers_have_low_scores() -> None:
    vectors = blobs(90, 16)
    vectors[4] = unit(vectors[4] + 0.7 * vectors[5])  # between two groups
    assigned, scores = cluster(vectors, 3)
    for group in range(3):
        members = [number for number in range(group, 90, 3) if number != 4]
        assert len(set(assigned[members].tolist())) == 1
    assert scores.argmin() == 4
    assert scores.max() <= 1 + 1e-6


def test_the_map_does_not_depend_on_rows_per_file_and_lists_evenly_spaced_samples(tmp_path: Path) -> None:
    vectors = blobs(50, 12)
    maps = []
    for rows_per_file in (50, 7, 1):
        folder = tmp_path / str(rows_per_file)
        spans = write_vectors(folder, vectors, rows_per_file)
        maps.append(compute_map(str(folder), spans, 50, encoder="small", layout="pca", clusters=3, max_points=10))
    for other in maps[1:]:
        assert (other.records, other.cluster) == (maps[0].records, maps[0].cluster)
        np.testing.assert_allclose(other.x, maps[0].x, atol=1e-5)
        np.testing.assert_allclose(other.y, maps[0].y, atol=1e-5)
    assert maps[0].records == [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]
    assert maps[0].samples == 50
    assert maps[0].locations[1] == "/data/5"
    assert maps[0].labels[:3] == [None, 1, 1]


def test_long_locations_are_shortened_and_invalid_characters_are_replaced(tmp_path: Path) -> None:
    names = ["/data/" + "x" * 300 + "/end.png", b"/data/\xff.png".decode("utf-8", "surrogateescape")]
    write_rows(str(tmp_path), range(2), blobs(2, 4), np.arange(2), np.zeros(2, np.int64), names)
    found = compute_map(str(tmp_path), [range(2)], 2, encoder="small", layout="pca", clusters=2)
    assert len(found.locations[0]) == MAX_LOCATION
    assert (found.locations[0][0], found.locations[0][-8:]) == ("…", "/end.png")
    assert found.locations[1] == "/data/\ufffd.png"


def test_umap_without_its_extra_is_rejected_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"layout=umap: umap-learn is not installed; install the extra umap"):
        check_layout("umap")
    check_layout("pca")


def test_a_set_too_small_for_umap_uses_principal_components(tmp_path: Path) -> None:
    spans = write_vectors(tmp_path, blobs(9, 8))
    found = compute_map(str(tmp_path), spans, 9, encoder="small", layout="umap", clusters=3)
    assert (found.layout, found.requested_layout) == ("pca", "umap")
