from __future__ import annotations

import numpy as np
from sklearn.metrics import top_k_accuracy_score

from amd.downstream.arrays import top_k


def test_top_k_counts_labels_among_the_k_highest_scores() -> None:
    scores = np.array([[3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]], np.float32)
    labels = np.array([1, 2, 3])
    assert [top_k(scores, labels, k) for k in (1, 2, 3, 4)] == [1, 2, 3, 3]


def test_top_k_of_distinct_scores_matches_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random((200, 12)), rng.integers(0, 12, 200)
    for k in (1, 5):
        assert top_k(scores, labels, k) == top_k_accuracy_score(labels, scores, k=k, labels=range(12), normalize=False)


def test_ties_go_to_the_lower_class() -> None:
    scores = np.zeros((3, 3), np.float32)
    assert top_k(scores, np.array([0, 1, 2]), 1) == 1
    assert top_k(scores, np.array([1, 1, 2]), 2) == 2
