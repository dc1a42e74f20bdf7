"""Probes on frozen features: nearest neighbours and a linear classifier. Arrays in, predictions and figures out.

Knows nothing of encoders or files.
Shapes: n learning samples, m scored samples, D features.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from amd.downstream.arrays import Array, Features, Labels

CHUNK_VALUES = 2**26  # similarities held at once
NEIGHBOURS = 20
TEMPERATURE = 0.07  # as in instance discrimination (Wu et al. 2018) and DINO's kNN evaluation


def knn(
    known: Features,
    asked: Array,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    centre: bool = False,
    device: torch.device | str = "cpu",
) -> Labels:
    """Labels of `asked` (m, D): the nearest known samples by cosine similarity s vote with weight exp(s / temperature).

    `centre` subtracts the mean of the known samples first: features that share a large part look alike without it. With
    fewer known samples than `neighbours` all of them vote. Asked samples are taken in chunks, so that memory is that of
    the features and 256 MiB of similarities. Returns (m,).
    """
    check_features(known, asked)
    mean = known.values.mean(axis=0) if centre else np.zeros(known.values.shape[1], np.float32)
    keys = torch.from_numpy(unit(known.values, mean)).to(device)  # (n, D)
    classes, numbered = np.unique(known.labels, return_inverse=True)
    k, chunk = min(neighbours, len(keys)), max(1, CHUNK_VALUES // max(len(keys), len(classes)))
    chosen = np.empty(len(asked), np.int64)
    for start in range(0, len(asked), chunk):
        queries = torch.from_numpy(unit(asked[start : start + chunk], mean)).to(device)  # (c, D)
        similarity, nearest = (queries @ keys.T).topk(k, dim=1, sorted=False)  # (c, k)
        weight = np.exp(similarity.cpu().numpy().astype(np.float64) / temperature)
        votes = np.zeros((len(queries), len(classes)))
        np.add.at(votes, (np.arange(len(queries))[:, None], numbered[nearest.cpu().numpy()]), weight)
        chosen[start : start + chunk] = classes[votes.argmax(axis=1)]
    return chosen


def linear(known: Features, asked: Array, *, strength: float = 0.1, iterations: int = 300) -> Labels:
    """Labels of `asked` (m, D) by logistic regression on standardised features; `strength` is scikit-learn's C.

    Standardised with the mean and deviation of the known samples; a feature that never varies counts as 0.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    check_features(known, asked)
    scaler = StandardScaler().fit(known.values.astype(np.float64))
    classifier = LogisticRegression(C=strength, max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the budget of iterations is part of the probe
        classifier.fit(scaler.transform(known.values), known.labels)
    chosen: Labels = classifier.predict(scaler.transform(asked)).astype(np.int64)
    return chosen


def top1(predicted: Labels, labels: Labels) -> float:
    """Percent right."""
    return float(100 * np.mean(predicted == labels))


def top_k(logits: Array, labels: Labels, k: int) -> float:
    """Percent whose label is among the k highest of (m, C)."""
    highest = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return float(100 * np.mean((highest == labels[:, None]).any(axis=1)))


def probe(known: Features, asked: Features) -> dict[str, float]:
    """Both probes: top-1 in percent as eval/top1 (linear), eval/knn_top1, eval/knn_centred_top1."""
    return {
        "eval/knn_top1": top1(knn(known, asked.values), asked.labels),
        "eval/knn_centred_top1": top1(knn(known, asked.values, centre=True), asked.labels),
        "eval/top1": top1(linear(known, asked.values), asked.labels),
    }


def unit(values: Array, mean: Array) -> Array:
    """Every row of (n, D) less the mean (D,), at length 1; a row without length stays so."""
    shifted = values - mean  # the one copy made: features may be gigabytes
    shifted /= np.maximum(np.sqrt(np.einsum("nd,nd->n", shifted, shifted)), 1e-12)[:, None]
    return shifted


def check_features(known: Features, asked: Array) -> None:
    """Raises ValueError for arrays that do not belong together, or hold what is no number."""
    if len(known.values) != len(known.labels):
        raise ValueError(f"{len(known.values)} features but {len(known.labels)} labels")
    if len(known.values) == 0 or len(asked) == 0:
        raise ValueError("a probe needs at least one known and one asked sample")
    if known.values.shape[1] != asked.shape[1]:
        raise ValueError(f"known features are {known.values.shape[1]} wide, asked ones {asked.shape[1]}")
    if not (np.isfinite(known.values).all() and np.isfinite(asked).all()):
        raise ValueError(
            "features hold numbers that are not finite: the encoder has diverged, or it was fed such pixels"
        )
