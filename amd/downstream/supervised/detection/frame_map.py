"""Frame-mAP as in AVA's official evaluation: PASCAL VOC average precision over all key frames.

A detection is correct if its box overlaps an annotated box of the same action with an IoU of at least 0.5; further
detections of that box are wrong, and so are detections in key frames without annotations.
Shapes: m annotated actions, n detected actions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from amd.downstream.supervised.detection.boxes import Boxes, paired_iou

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
IOU = 0.5


class AnnotatedActions(NamedTuple):
    """Annotated actions, one row per box and action."""

    frames: Numbers  # (m,) key-frame numbers
    boxes: Boxes  # (m, 4)
    actions: Numbers  # (m,)


class DetectedActions(NamedTuple):
    """Detected actions, one row per box and action."""

    frames: Numbers  # (n,)
    boxes: Boxes  # (n, 4)
    actions: Numbers  # (n,)
    scores: npt.NDArray[np.floating[Any]]  # (n,)


def average_precisions(
    truth: AnnotatedActions, found: DetectedActions, actions: Iterable[int], iou: float = IOU
) -> dict[int, float]:
    """Return the average precision, in [0, 1], of each given action that has annotations."""
    result: dict[int, float] = {}
    for action in actions:
        mine, theirs = truth.actions == action, found.actions == action
        if mine.any():
            hits = match(
                truth.frames[mine],
                truth.boxes[mine],
                found.frames[theirs],
                found.boxes[theirs],
                found.scores[theirs],
                iou,
            )
            result[action] = average_precision(hits, int(mine.sum()))
    return result


def match(
    frames: Numbers,
    boxes: Boxes,
    found_frames: Numbers,
    found_boxes: Boxes,
    scores: npt.NDArray[np.floating[Any]],
    iou: float,
) -> npt.NDArray[np.bool_]:
    """Return whether each detection of one action is correct, highest score first: (n,).

    A detection matches the annotated box with the highest IoU if that IoU reaches the threshold; only the first match
    of a box is correct.
    Deviation: equal scores keep their input order, which the official code leaves undefined.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.zeros(len(order), bool)
    by_frame = np.argsort(frames, kind="stable")
    start = np.searchsorted(frames[by_frame], found_frames[order], "left")
    count = np.searchsorted(frames[by_frame], found_frames[order], "right") - start
    candidates = np.flatnonzero(count)  # detections in annotated key frames
    if not len(candidates):
        return hits
    start, count = start[candidates], count[candidates]
    first = np.cumsum(count) - count  # offset of each candidate's pairs
    pair = np.arange(count.sum())
    annotated = by_frame[pair - np.repeat(first - start, count)]
    overlap = paired_iou(boxes[annotated], found_boxes[order][np.repeat(candidates, count)])
    best = np.maximum.reduceat(overlap, first)  # (candidates,)
    winner = np.minimum.reduceat(np.where(overlap == np.repeat(best, count), pair, len(pair)), first)
    enough = best >= iou
    _, earliest = np.unique(annotated[winner[enough]], return_index=True)
    hits[candidates[enough][earliest]] = True
    return hits


def average_precision(hits: npt.NDArray[np.bool_], annotated: int) -> float:
    """Return the area under the precision-recall curve with monotonically decreasing precision (VOC 2010).

    hits: (n,) whether each detection is correct, highest score first.
    """
    right = np.cumsum(hits)
    recall = np.concatenate([[0.0], right / annotated, [1.0]])
    precision = np.concatenate([[0.0], right / np.arange(1, len(hits) + 1), [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))
