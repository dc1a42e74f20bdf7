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
def test_knn_answers_as_scikit_learn_with_cosine_distance_and_the_same_weights(neighbours: int, centre: bool) -> None:
    known, asked = clouds(1, 200), clouds(2, 100)
    shift = known.values.mean(axis=0) if centre else 0.0
    peer = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    peer.fit(known.values - shift, known.labels)
    answer = knn(known, asked.values, neighbours=neighbours, centre=centre)
    np.testing.assert_array_equal(answer, peer.predict(asked.values - shift))


@pytest.mark.parametrize("held", [1, 199, 1000])
def test_chunks_of_any_size_give_the_same_answers(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = clouds(1, 200), clouds(2, 101)
    whole = knn(known, asked.values)
    monkeypatch.setattr(
        "amd.downstream.probing.classifiers.CHUNK_VALUES", held
    )  # similarities at once: 1 or 5 asked samples
    np.testing.assert_array_equal(knn(known, asked.values), whole)


def test_one_close_neighbour_outvotes_two_far_ones() -> None:
    """By hand: similarity 1 weighs e^(1/0.07) = 1.6e6, two of 0.8 weigh 2 * e^(0.8/0.07) = 1.8e5."""
    known = Features(np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], np.float32), np.array([7, 3, 3]))
    asked = np.array([[2, 0]], np.float32)  # length does not matter
    assert knn(known, asked).tolist() == [7]
    assert knn(known, asked, temperature=1.0).tolist() == [3]


def test_centring_takes_away_what_all_features_share() -> None:
    """A large common part makes all samples alike: the more frequent label wins every vote, until it is taken away."""
    labels = np.arange(41) % 2  # 21 of label 0
    values = np.random.default_rng(3).normal(size=(41, 6)) * 0.1
    values[:, 0] += 100
    values[:, 1] += np.where(labels == 0, 0.5, -0.5)
    known = Features(values.astype(np.float32), labels)
    assert set(knn(known, known.values, neighbours=41).tolist()) == {0}
    assert top1(knn(known, known.values, neighbours=41, centre=True), labels) == 100


def test_with_fewer_known_samples_than_neighbours_all_vote() -> None:
    known = clouds(1, 5)
    assert knn(known, known.values, neighbours=20).shape == (5,)


def test_linear_is_logistic_regression_on_standardised_features() -> None:
    known, asked = clouds(1, 200), clouds(2, 100)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(known.values, known.labels)
    np.testing.assert_array_equal(linear(known, asked.values), peer.predict(asked.values))


@settings(max_examples=10, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-5, 5))
def test_linear_does_not_mind_the_scale_of_features(scale: float, shift: float) -> None:
    known, asked = clouds(1, 60, width=4), clouds(2, 40, width=4)
    moved = Features((known.values * scale + shift).astype(np.float32), known.labels)
    same = linear(known, asked.values) == linear(moved, (asked.values * scale + shift).astype(np.float32))
    assert same.mean() > 0.97  # rounding may move a point on the border


def test_a_feature_that_never_varies_does_no_harm() -> None:
    known, asked = clouds(1, 100), clouds(2, 50)
    padded = Features(np.pad(known.values, ((0, 0), (0, 1))), known.labels)
    np.testing.assert_array_equal(linear(known, asked.values), linear(padded, np.pad(asked.values, ((0, 0), (0, 1)))))


def test_labels_need_not_count_from_zero() -> None:
    known, asked = clouds(1, 100), clouds(2, 50)
    renamed = Features(known.values, known.labels * 10 - 3)
    for predict in (knn, linear):
        np.testing.assert_array_equal(predict(known, asked.values) * 10 - 3, predict(renamed, asked.values))


def test_figures_are_percent_and_chance_where_features_say_nothing() -> None:
    rng = np.random.default_rng(0)
    noise = Features(rng.normal(size=(2000, 8)).astype(np.float32), rng.integers(0, 10, 2000))
    other = Features(rng.normal(size=(2000, 8)).astype(np.float32), rng.integers(0, 10, 2000))
    for name, score in probe(noise, other).items():
        assert 7 < score < 13, name
    assert top1(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 75


def test_features_of_a_diverged_encoder_are_told() -> None:
    known = clouds(1, 30)
    with pytest.raises(ValueError, match="not finite"):
        knn(known, np.full((2, 12), np.nan, np.float32))


@pytest.mark.parametrize(
    ("known", "asked", "words"),
    [
        (Features(np.ones((3, 2), np.float32), np.zeros(4, np.int64)), np.ones((1, 2), np.float32), "3 features but 4"),
        (Features(np.ones((3, 2), np.float32), np.zeros(3, np.int64)), np.ones((1, 5), np.float32), "2 wide.* 5"),
        (Features(np.ones((0, 2), np.float32), np.zeros(0, np.int64)), np.ones((1, 2), np.float32), "at least one"),
    ],
)
def test_arrays_that_do_not_fit_are_told(known: Features, asked: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear(known, asked)
