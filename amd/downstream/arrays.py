"""NumPy types for features and labels, and a metric shared by all evaluations.

Shapes: n samples, N tokens, D features, C classes.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int64]


class Features(NamedTuple):
    values: Array  # (n, D)
    labels: Labels  # (n,)


class TokenFeatures(NamedTuple):
    values: npt.NDArray[np.float16]  # (n, N, D), in half precision, since they are N times as many
    labels: Labels  # (n,)


def top_k(scores: npt.NDArray[np.floating], labels: Labels, k: int) -> int:
    """Count the samples whose label has one of the k highest scores (n, C); ties go to the lower class index."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return int((best == labels[:, None]).any(axis=1).sum())
