from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from amd.downstream.arrays import Features
from amd.downstream.probing.classifiers import knn, linear, probe, top1


def clouds(seed: int, count: int, classes: int = 4, width: int = 12, spread: float = 0.8) -> Features:
    centres = np.random.default_rng(0).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return Features((centres[labels] + spread * rng.normal(size=(count, width))).astype(np.float32), labels)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_knn_matches_scikit_learn_with_cosine_distance_and_the_same_weights(neighbours: int, centre: bool) -> None:
    train, test = clouds(1, 200), clouds(2, 100)
    shift = train.values.mean(axis=0) if centre else 0.0
    peer = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    peer.fit(train.values - shift, train.labels)
    predicted = knn(train, test.values, neighbours=neighbours, centre=centre)
    np.testing.assert_array_equal(predicted, peer.predict(test.values - shift))


@pytest.mark.parametrize("chunk", [1, 199, 1000])
def test_predictions_do_not_depend_on_the_chunk_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clouds(1, 200), clouds(2, 101)
    whole = knn(train, test.values)
    monkeypatch.setattr("amd.downstream.probing.classifiers.CHUNK_VALUES", chunk)  # chunks of 1 or 5 test samples
    np.testing.assert_array_equal(knn(train, test.values), whole)


def test_one_close_neighbour_outvotes_two_distant_ones() -> None:
    """A similarity of 1 weighs e^(1/0.07) = 1.6e6; two similarities of 0.8 together weigh 2 * e^(0.8/0.07) = 1.8e5."""
    train = Features(np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], np.float32), np.array([7, 3, 3]))
    test = np.array([[2, 0]], np.float32)  # the norm of a vector does not matter
    assert knn(train, test).tolist() == [7]
    assert knn(train, test, temperature=1.0).tolist() == [3]


def test_centring_removes_the_common_component() -> None:
    """A large common component makes all samples similar, so without centring the most frequent label always wins."""
    labels = np.arange(41) % 2  # 21 of label 0
    values = np.random.default_rng(3).normal(size=(41, 6)) * 0.1
    values[:, 0] += 100
    values[:, 1] += np.where(labels == 0, 0.5, -0.5)
    train = Features(values.astype(np.float32), labels)
    assert set(knn(train, train.values, neighbours=41).tolist()) == {0}
    assert top1(knn(train, train.values, neighbours=41, centre=True), labels) == 100


def test_every_training_sample_votes_if_there_are_fewer_than_k() -> None:
    train = clouds(1, 5)
    assert knn(train, train.values, neighbours=20).shape == (5,)


def test_linear_matches_logistic_regression_on_standardised_features() -> None:
    train, test = clouds(1, 200), clouds(2, 100)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(train.values, train.labels)
    np.testing.assert_array_equal(linear(train, test.values), peer.predict(test.values))


@settings(max_examples=10, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-5, 5))
def test_linear_is_invariant_to_scale_and_shift_of_features(scale: float, shift: float) -> None:
    train, test = clouds(1, 60, width=4), clouds(2, 40, width=4)
    moved = Features((train.values * scale + shift).astype(np.float32), train.labels)
    same = linear(train, test.values) == linear(moved, (test.values * scale + shift).astype(np.float32))
    assert same.mean() > 0.97  # rounding may flip a sample at the decision boundary


def test_a_constant_feature_is_ignored() -> None:
    train, test = clouds(1, 100), clouds(2, 50)
    padded = Features(np.pad(train.values, ((0, 0), (0, 1))), train.labels)
    np.testing.assert_array_equal(linear(train, test.values), linear(padded, np.pad(test.values, ((0, 0), (0, 1)))))


def test_labels_need_not_start_at_zero() -> None:
    train, test = clouds(1, 100), clouds(2, 50)
    renamed = Features(train.values, train.labels * 10 - 3)
    for predict in (knn, linear):
        np.testing.assert_array_equal(predict(train, test.values) * 10 - 3, predict(renamed, test.values))


def test_scores_are_percentages_and_noise_features_score_at_chance() -> None:
    rng = np.random.default_rng(0)
    noise = Features(rng.normal(size=(2000, 8)).astype(np.float32), rng.integers(0, 10, 2000))
    other = Features(rng.normal(size=(2000, 8)).astype(np.float32), rng.integers(0, 10, 2000))
    for name, score in probe(noise, other).items():
        assert 7 < score < 13, name
    assert top1(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 75


def test_non_finite_features_are_rejected() -> None:
    train = clouds(1, 30)
    with pytest.raises(ValueError, match="not finite"):
        knn(train, np.full((2, 12), np.nan, np.float32))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (Features(np.ones((3, 2), np.float32), np.zeros(4, np.int64)), np.ones((1, 2), np.float32), "3 features but 4"),
        (
            Features(np.ones((3, 2), np.float32), np.zeros(3, np.int64)),
            np.ones((1, 5), np.float32),
            "2.* width 5",
        ),
        (Features(np.ones((0, 2), np.float32), np.zeros(0, np.int64)), np.ones((1, 2), np.float32), "at least one"),
    ],
)
def test_inconsistent_arrays_are_rejected(train: Features, test: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(train, test)
