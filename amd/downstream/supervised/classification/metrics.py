"""From logits of views to figures: merging, top-1 and top-5, mean average precision, confusion, per-class report.

Arrays in, numbers out; knows nothing of networks, files or ranks.
Shapes: n views, m samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


class Merged(NamedTuple):
    """The views of each sample put together."""

    records: Numbers  # (m,) ascending
    probabilities: Floats  # (m, C), the mean over views
    views: Numbers  # (m,) how many were merged


def probabilities(logits: npt.NDArray[np.floating], multi_label: bool = False) -> Floats:
    """Softmax over classes, or a sigmoid each, in float64. (n, C) -> (n, C)."""
    values = logits.astype(np.float64)
    if multi_label:
        return np.asarray(np.exp(-np.logaddexp(0, -values)))  # a sigmoid that does not overflow
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def merge(records: Numbers, views: Numbers, logits: npt.NDArray[np.floating], multi_label: bool = False) -> Merged:
    """Mean of the probabilities of each record's views, each view counted once, as the official `merge` does.

    records (n,), views (n,) numbers of a record's views, logits (n, C). A view that is there twice (a padded sampler)
    is taken once.
    """
    _, first = np.unique(np.stack([records, views], axis=1), axis=0, return_index=True)
    records, scored = records[first], probabilities(logits[first], multi_label)
    ids, starts, counts = np.unique(records, return_index=True, return_counts=True)  # the views of each are together
    return Merged(ids, np.add.reduceat(scored, starts, axis=0) / counts[:, None], counts)


def join(parts: Sequence[Merged]) -> Merged:
    """What several ranks merged; a record that two of them have (a padded sampler) is taken once."""
    ids, scored, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    ids, first = np.unique(ids, return_index=True)
    return Merged(ids, scored[first], counts[first])


def top_k(scored: Floats, labels: Numbers, k: int) -> int:
    """How many samples have their label among the k highest of (m, C) scores; ties go to the lower class."""
    best = np.argsort(-scored, axis=1, kind="stable")[:, :k]
    return int((best == labels[:, None]).any(axis=1).sum())


def single_label(scored: Floats, labels: Numbers, total: int) -> dict[str, float]:
    """Top-1 and top-5 in percent of `total` samples: those that could not be read count as wrong."""
    k = min(5, scored.shape[1])
    return {
        "eval/top1": 100 * top_k(scored, labels, 1) / total,
        "eval/top5": 100 * top_k(scored, labels, k) / total,
    }


def cross_entropy(scored: Floats, labels: Numbers) -> float:
    """Mean over samples of -log of the probability (m, C) that the right class got."""
    right = scored[np.arange(len(labels)), labels]
    return float(-np.log(right.clip(1e-12)).mean())


def multi_label(scored: Floats, truth: npt.NDArray[np.integer]) -> dict[str, float]:
    """Mean average precision in percent over the classes that occur. (m, C) scores and zeros and ones."""
    from sklearn.metrics import average_precision_score

    occurring = truth.any(axis=0)
    each = [average_precision_score(truth[:, c], scored[:, c]) for c in np.flatnonzero(occurring)]
    return {"eval/map": 100 * float(np.mean(each)) if each else 0.0}


def confusion(predicted: Numbers, labels: Numbers, classes: int) -> Numbers:
    """(C, C): how often a sample of class row was taken for class column."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def class_report(matrix: Numbers, names: tuple[str, ...] | None) -> list[dict[str, float | int | str]]:
    """Samples, recall and precision in percent of every class, from its confusion matrix."""
    rows: list[dict[str, float | int | str]] = []
    for c in range(len(matrix)):
        samples, taken, right = int(matrix[c].sum()), int(matrix[:, c].sum()), int(matrix[c, c])
        rows.append(
            {
                "class": c,
                "name": names[c] if names else str(c),
                "samples": samples,
                "recall": 100 * right / samples if samples else float("nan"),
                "precision": 100 * right / taken if taken else float("nan"),
            }
        )
    return rows
