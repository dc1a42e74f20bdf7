"""Classification metrics: merged views, top-1 and top-5, mean average precision, confusion matrix, per-class report.

Pure functions on arrays.
Shapes: n views, m samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amd.downstream.arrays import top_k

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


class MergedViews(NamedTuple):
    """Probabilities of each sample, averaged over its views."""

    records: Numbers  # (m,) ascending
    probabilities: Floats  # (m, C), the mean over views
    views: Numbers  # (m,) number of views merged


def probabilities(logits: npt.NDArray[np.floating], multi_label: bool = False) -> Floats:
    """Apply softmax over classes, or a sigmoid per class if multi-label, in float64: (n, C) -> (n, C)."""
    values = logits.astype(np.float64)
    if multi_label:
        return np.asarray(np.exp(-np.logaddexp(0, -values)))  # a sigmoid that does not overflow
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def merge(records: Numbers, views: Numbers, logits: npt.NDArray[np.floating], multi_label: bool = False) -> MergedViews:
    """Average the probabilities of each record's views, as in the official `merge`.

    Takes records (n,), view numbers within a record (n,) and logits (n, C). Duplicate views (from a padded
    sampler) count once.
    """
    _, first = np.unique(np.stack([records, views], axis=1), axis=0, return_index=True)
    records, scored = records[first], probabilities(logits[first], multi_label)
    ids, starts, counts = np.unique(records, return_index=True, return_counts=True)  # views of a record are adjacent
    return MergedViews(ids, np.add.reduceat(scored, starts, axis=0) / counts[:, None], counts)


def join(parts: Sequence[MergedViews]) -> MergedViews:
    """Concatenate the merged views from several ranks; duplicate records (from a padded sampler) count once."""
    ids, scored, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    ids, first = np.unique(ids, return_index=True)
    return MergedViews(ids, scored[first], counts[first])


def single_label(scored: Floats, labels: Numbers, total: int) -> dict[str, float]:
    """Return top-1 and top-5 in percent of `total` samples; unreadable samples count as wrong."""
    k = min(5, scored.shape[1])
    return {
        "eval/top1": 100 * top_k(scored, labels, 1) / total,
        "eval/top5": 100 * top_k(scored, labels, k) / total,
    }


def cross_entropy(scored: Floats, labels: Numbers) -> float:
    """Return the mean negative log probability of the correct class, from probabilities (m, C)."""
    correct = scored[np.arange(len(labels)), labels]
    return float(-np.log(correct.clip(1e-12)).mean())


def multi_label(scored: Floats, truth: npt.NDArray[np.integer]) -> dict[str, float]:
    """Return the mean average precision in percent over the classes that occur; scores and truth are (m, C)."""
    from sklearn.metrics import average_precision_score

    occurring = truth.any(axis=0)
    each = [average_precision_score(truth[:, c], scored[:, c]) for c in np.flatnonzero(occurring)]
    return {"eval/map": 100 * float(np.mean(each)) if each else 0.0}


def confusion(predicted: Numbers, labels: Numbers, classes: int) -> Numbers:
    """Return the confusion matrix (C, C): rows are true classes, columns predicted classes."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def class_report(matrix: Numbers, names: tuple[str, ...] | None) -> list[dict[str, float | int | str]]:
    """Return each class's sample count, recall and precision (in percent), computed from a confusion matrix."""
    samples, predicted, correct = matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal()
    with np.errstate(invalid="ignore"):  # NaN for a class that does not occur, or is never predicted
        recall, precision = 100 * correct / samples, 100 * correct / predicted
    columns: dict[str, Sequence[float | int | str]] = {
        "class": range(len(matrix)),
        "name": names or [str(c) for c in range(len(matrix))],
        "samples": samples.tolist(),
        "recall": recall.tolist(),
        "precision": precision.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
