"""Two-dimensional layout of an embedded data set, with clusters and scores, for the console's map.

Reads the unit vectors of the neighbour search, one file at a time. Principal components are exact and use all samples;
memory is limited to one file, a D x D matrix, and the vectors of the samples on the map. Results are deterministic.
Shapes: n samples on the map, r rows in a file, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from amd.config import ConfigError
from amd.config.embed import MapLayout
from amd.downstream.embedding.files import SearchRows, Vectors, read_rows, unit
from amd.downstream.embedding.map_files import MAX_POINTS, EmbeddingMap, shortened_location

CHUNK_ROWS = 4096  # converted to float64 at a time
UMAP_NEIGHBOURS = 15
SEED = 0

Float64 = npt.NDArray[np.float64]


class Projection(NamedTuple):
    """The first two principal components."""

    mean: Float64  # (D,)
    axes: Float64  # (2, D)
    explained_variance: tuple[float, float]
    """Share of the variance along each axis."""

    def __call__(self, vectors: Vectors) -> Float64:
        """Project vectors: (n, D) -> (n, 2)."""
        return np.asarray((vectors - self.mean) @ self.axes.T, np.float64)


class MapSamples(NamedTuple):
    """The samples on a map."""

    vectors: Vectors  # (n, D)
    records: list[int]
    locations: list[str]
    labels: list[int | None]


def check_layout(layout: MapLayout) -> None:
    """Raise ConfigError if the layout needs a package that is not installed."""
    if layout == "umap" and find_spec("umap") is None:
        raise ConfigError(
            [
                "layout=umap: umap-learn is not installed; install the extra umap (pip install 'amd-service[umap]'), "
                "or use layout=pca"
            ]
        )


def compute_map(
    output: str,
    spans: Sequence[range],
    count: int,
    *,
    encoder: str,
    layout: Literal["pca", "umap"],
    clusters: int,
    max_points: int = MAX_POINTS,
) -> EmbeddingMap:
    """Lay out the `count` embedded samples in an output folder; `spans` lists its files."""
    projection = fit_projection(rows.vectors for rows in _files(output, spans))
    samples = _choose_samples(_files(output, spans), count, max_points)
    used = layout if len(samples.records) > UMAP_NEIGHBOURS else "pca"
    positions = _umap(samples.vectors) if used == "umap" else projection(samples.vectors)
    assigned, scores = cluster(samples.vectors, clusters)
    return EmbeddingMap(
        encoder=encoder,
        layout=used,
        requested_layout=layout,
        samples=count,
        clusters=clusters,
        explained_variance=projection.explained_variance if used == "pca" else None,
        records=samples.records,
        locations=samples.locations,
        labels=samples.labels,
        x=_rounded(positions[:, 0]),
        y=_rounded(positions[:, 1]),
        cluster=assigned.tolist(),
        score=_rounded(scores),
    )


def fit_projection(files: Iterable[Vectors]) -> Projection:
    """Fit the first two principal components of all rows (r, D).

    The largest value of each axis is positive, since the sign of a component is arbitrary.
    """
    count, total, products = 0, np.zeros(0), np.zeros((0, 0))
    for vectors in files:
        for start in range(0, len(vectors), CHUNK_ROWS):
            chunk = vectors[start : start + CHUNK_ROWS].astype(np.float64)
            if not count:
                total, products = np.zeros(chunk.shape[1]), np.zeros((chunk.shape[1], chunk.shape[1]))
            count += len(chunk)
            total += chunk.sum(0)
            products += chunk.T @ chunk
    mean = total / count
    covariance = products / count - np.outer(mean, mean)
    variances, vectors_by_column = np.linalg.eigh(covariance)  # in ascending order
    axes = np.zeros((2, len(mean)))
    found = vectors_by_column[:, ::-1][:, :2].T  # a single row if D is 1
    axes[: len(found)] = found * np.sign(found[np.arange(len(found)), np.abs(found).argmax(1)])[:, None]
    shares = np.zeros(2)
    if (whole := float(np.trace(covariance))) > 0:
        shares[: len(found)] = np.clip(variances[::-1][:2], 0, None) / whole
    return Projection(mean, axes, (float(shares[0]), float(shares[1])))


def cluster(vectors: Vectors, clusters: int) -> tuple[npt.NDArray[np.int64], Float64]:
    """Divide samples (n, D) into clusters; return each sample's cluster and its cosine similarity to the center."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct samples than clusters
        model = KMeans(min(clusters, len(vectors)), n_init=1, random_state=SEED).fit(vectors)
    assigned = model.labels_.astype(np.int64)
    centers = unit(model.cluster_centers_)[assigned]
    return assigned, np.einsum("nd,nd->n", vectors, centers, dtype=np.float64)


def _files(output: str, spans: Iterable[range]) -> Iterator[SearchRows]:
    return (read_rows(output, span) for span in spans)


def _choose_samples(files: Iterable[SearchRows], count: int, limit: int) -> MapSamples:
    """Return all samples or, if there are more than `limit`, an evenly spaced subset."""
    numbers = np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)
    first = 0
    vectors: list[Vectors] = []
    samples = MapSamples(np.zeros((0, 0), np.float32), [], [], [])
    for rows in files:
        own = numbers[(numbers >= first) & (numbers < first + len(rows.records))] - first
        first += len(rows.records)
        vectors.append(rows.vectors[own])
        samples.records.extend(rows.records[own].tolist())
        samples.locations.extend(shortened_location(rows.locations[row]) for row in own.tolist())
        samples.labels.extend(rows.label(row) for row in own.tolist())
    return samples._replace(vectors=np.concatenate(vectors))


def _umap(vectors: Vectors) -> Float64:
    import umap

    model = umap.UMAP(n_neighbors=UMAP_NEIGHBOURS, metric="cosine", random_state=SEED, n_jobs=1)
    return np.asarray(model.fit_transform(vectors), np.float64)


def _rounded(values: Float64) -> list[float]:
    """Round to six decimal places, to keep the file small."""
    rounded: list[float] = np.round(values, 6).tolist()
    return rounded
