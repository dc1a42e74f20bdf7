from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.downstream.supervised.detection.frame_map import (
    AnnotatedActions,
    DetectedActions,
    average_precision,
    average_precisions,
)

A, B = [0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]
NEAR_A = [0.0, 0.0, 0.4, 0.3]  # 3/4 of A
FAR_A = [0.0, 0.0, 0.4, 0.19]  # less than half of A


def _annotated(*rows: tuple[int, list[float], int]) -> AnnotatedActions:
    frames, boxes, actions = zip(*rows, strict=True)
    return AnnotatedActions(np.array(frames), np.array(boxes), np.array(actions))


def _detected(*rows: tuple[int, list[float], int, float]) -> DetectedActions:
    frames, boxes, actions, scores = zip(*rows, strict=True)
    return DetectedActions(np.array(frames), np.array(boxes), np.array(actions), np.array(scores))


def test_average_precision_matches_a_manual_calculation() -> None:
    truth = _annotated((0, A, 1), (0, B, 1), (1, A, 1), (1, B, 2))
    found = _detected(
        (0, NEAR_A, 1, 0.9),  # correct: precision 1, recall 1/3
        (0, A, 1, 0.8),  # the same person again: precision 1/2
        (2, A, 1, 0.7),  # nothing is annotated there: precision 1/3
        (1, A, 1, 0.6),  # correct: precision 2/4, recall 2/3
        (0, FAR_A, 1, 0.5),  # overlaps too little: precision 2/5
        (1, A, 2, 0.9),  # a different person
        (1, B, 2, 0.8),  # correct: precision 1/2, recall 1
    )
    precisions = average_precisions(truth, found, [1, 2, 3])
    # Action 1: a third of recall at precision 1, a third at 1/2; B of frame 0 is not detected.
    assert precisions == pytest.approx({1: 1 / 3 + 1 / 3 * 1 / 2, 2: 1 / 2})  # 3 is not annotated: not scored


def test_an_overlap_of_exactly_half_counts_as_a_match() -> None:
    truth = _annotated((0, [0.0, 0.0, 1.0, 1.0], 1))
    assert average_precisions(truth, _detected((0, [0.0, 0.0, 1.0, 0.5], 1, 1.0)), [1]) == {1: 1.0}
    assert average_precisions(truth, _detected((0, [0.0, 0.0, 1.0, 0.49], 1, 1.0)), [1]) == {1: 0.0}


def test_precision_is_made_monotonic_before_integration() -> None:
    # false, true, true: precisions 0, 1/2, 2/3 become 2/3, 2/3, 2/3
    assert average_precision(np.array([False, True, True]), 2) == pytest.approx(2 / 3)
    assert average_precision(np.array([], bool), 2) == 0


def test_undetected_annotations_count_as_missed() -> None:
    truth = _annotated((0, A, 1), (1, A, 1))
    none = DetectedActions(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    assert average_precisions(truth, none, [1]) == {1: 0.0}
    assert average_precisions(truth, _detected((0, A, 1, 0.1)), [1]) == {1: 0.5}


def _reference_average_precision(truth: AnnotatedActions, found: DetectedActions, action: int) -> float:
    """Compute the average precision as defined by the official evaluation, one detection at a time."""
    persons = {f: [b for g, b, a in zip(*truth, strict=True) if (g, a) == (f, action)] for f in truth.frames.tolist()}
    matched: set[tuple[int, int]] = set()
    rows = [row for row in zip(*found, strict=True) if row[2] == action]
    correct, precision, recall = 0, [0.0], [0.0]
    total = sum(map(len, persons.values()))
    for predictions, (frame, box, _, _) in enumerate(sorted(rows, key=lambda row: -row[3]), start=1):
        overlaps = [_iou(box, other) for other in persons.get(int(frame), [])]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if best >= 0 and overlaps[best] >= 0.5 and (int(frame), best) not in matched:
            matched.add((int(frame), best))
            correct += 1
        precision.append(correct / predictions)
        recall.append(correct / total)
    area = 0.0
    for i in range(1, len(recall)):
        area += (recall[i] - recall[i - 1]) * max(precision[i:])
    return area


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return float(common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 6), annotated=st.integers(1, 25), found=st.integers(0, 60))
def test_average_precision_matches_the_reference_implementation(
    seed: int, frames: int, annotated: int, found: int
) -> None:
    rng = np.random.default_rng(seed)

    def random_boxes(count: int) -> np.ndarray:
        corner = rng.integers(0, 4, (count, 2)) / 10
        return np.concatenate([corner, corner + rng.integers(3, 6, (count, 2)) / 10], axis=1)

    truth = AnnotatedActions(rng.integers(0, frames, annotated), random_boxes(annotated), rng.integers(1, 4, annotated))
    scores = rng.permutation(found) / max(1, found)  # no ties: their order is not defined
    predictions = DetectedActions(
        rng.integers(0, frames + 1, found), random_boxes(found), rng.integers(1, 4, found), scores
    )
    ours = average_precisions(truth, predictions, [1, 2, 3])
    assert set(ours) == set(truth.actions.tolist())
    for action, value in ours.items():
        assert value == pytest.approx(_reference_average_precision(truth, predictions, action))
