"""Classifiers on frozen features: k-nearest neighbours and logistic regression.

Takes arrays and returns predictions and metrics; loads no encoders and reads no files.
Shapes: n training samples, m test samples, D features.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from amd.downstream.arrays import Array, Features, Labels

CHUNK_VALUES = 2**26  # similarities in memory at once
NEIGHBOURS = 20
TEMPERATURE = 0.07  # as in instance discrimination (Wu et al. 2018) and DINO's kNN evaluation


def knn(
    train: Features,
    test: Array,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    centre: bool = False,
    device: torch.device | str = "cpu",
) -> Labels:
    """Predict the labels (m,) of `test` (m, D) by a weighted vote of the nearest training samples.

    The weight of a vote is exp(s / temperature), where s is the cosine similarity. `centre` subtracts the mean of the
    training samples first, since a large common component makes all features similar. If there are fewer training
    samples than `neighbours`, all of them vote. Test samples are processed in chunks, which limits memory to the
    features plus 256 MiB of similarities.
    """
    check_features(train, test)
    mean = train.values.mean(axis=0) if centre else np.zeros(train.values.shape[1], np.float32)
    keys = torch.from_numpy(unit(train.values, mean)).to(device)  # (n, D)
    classes, numbered = np.unique(train.labels, return_inverse=True)
    k, chunk = min(neighbours, len(keys)), max(1, CHUNK_VALUES // max(len(keys), len(classes)))
    predicted = np.empty(len(test), np.int64)
    for start in range(0, len(test), chunk):
        queries = torch.from_numpy(unit(test[start : start + chunk], mean)).to(device)  # (c, D)
        similarity, nearest = (queries @ keys.T).topk(k, dim=1, sorted=False)  # (c, k)
        weight = np.exp(similarity.cpu().numpy().astype(np.float64) / temperature)
        votes = np.zeros((len(queries), len(classes)))
        np.add.at(votes, (np.arange(len(queries))[:, None], numbered[nearest.cpu().numpy()]), weight)
        predicted[start : start + chunk] = classes[votes.argmax(axis=1)]
    return predicted


def linear(train: Features, test: Array, *, strength: float = 0.1, iterations: int = 300) -> Labels:
    """Predict labels of `test` (m, D) by logistic regression on standardised features; `strength` is scikit-learn's C.

    The mean and standard deviation come from the training samples; constant features become 0.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    check_features(train, test)
    scaler = StandardScaler().fit(train.values.astype(np.float64))
    classifier = LogisticRegression(C=strength, max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iteration limit is part of the probe
        classifier.fit(scaler.transform(train.values), train.labels)
    predicted: Labels = classifier.predict(scaler.transform(test)).astype(np.int64)
    return predicted


def top1(predicted: Labels, labels: Labels) -> float:
    """Return the top-1 accuracy in percent."""
    return float(100 * np.mean(predicted == labels))


def probe(train: Features, test: Features) -> dict[str, float]:
    """Run both probes; return top-1 accuracies in percent: eval/top1 (linear), eval/knn_top1, eval/knn_centred_top1."""
    return {
        "eval/knn_top1": top1(knn(train, test.values), test.labels),
        "eval/knn_centred_top1": top1(knn(train, test.values, centre=True), test.labels),
        "eval/top1": top1(linear(train, test.values), test.labels),
    }


def unit(values: Array, mean: Array) -> Array:
    """Subtract the mean (D,) from features (n, D) and scale every row to length 1; zero rows stay zero."""
    shifted = values - mean  # the only copy, as features can take gigabytes
    shifted /= np.maximum(np.sqrt(np.einsum("nd,nd->n", shifted, shifted)), 1e-12)[:, None]
    return shifted


def check_features(train: Features, test: Array) -> None:
    """Check that features have consistent shapes and finite values. Raises ValueError."""
    if len(train.values) != len(train.labels):
        raise ValueError(f"{len(train.values)} features but {len(train.labels)} labels; every feature needs a label")
    if len(train.values) == 0 or len(test) == 0:
        raise ValueError("a probe needs at least one training sample and one test sample")
    if train.values.shape[1] != test.shape[1]:
        raise ValueError(
            f"training features have width {train.values.shape[1]}, but test features have width {test.shape[1]}"
        )
    if not (np.isfinite(train.values).all() and np.isfinite(test).all()):
        raise ValueError("features contain non-finite values: the encoder has diverged, or its input was not finite")
