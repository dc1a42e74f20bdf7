"""Frame-mAP as AVA's official evaluation has it: average precision of PASCAL VOC over all key frames together.

Arrays in, numbers out. An action is found where its box overlaps an annotated one of that action by half or more; a
second detection of the same one is wrong, and so is any in a key frame where nothing is annotated.
Shapes: m annotated actions of boxes, n detected ones.
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


class Annotated(NamedTuple):
    """What people do: one row an action of a box."""

    frames: Numbers  # (m,) any number for each key frame
    boxes: Boxes  # (m, 4)
    actions: Numbers  # (m,)


class Detected(NamedTuple):
    """What a network says they do."""

    frames: Numbers  # (n,)
    boxes: Boxes  # (n, 4)
    actions: Numbers  # (n,)
    scores: npt.NDArray[np.floating[Any]]  # (n,)


def average_precisions(truth: Annotated, found: Detected, actions: Iterable[int], iou: float = IOU) -> dict[int, float]:
    """Of each of these actions that is annotated at all, in [0, 1]."""
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
    """Of one action: which detections are right, the highest score first; (n,).

    Each detection goes to the annotated box that it overlaps most, if by enough, and the first one there is right.
    Departure: equal scores keep the order in which they came, the official order of those is not defined.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.zeros(len(order), bool)
    by_frame = np.argsort(frames, kind="stable")
    start = np.searchsorted(frames[by_frame], found_frames[order], "left")
    count = np.searchsorted(frames[by_frame], found_frames[order], "right") - start
    rivals = np.flatnonzero(count)  # detections with something annotated in their frame
    if not len(rivals):
        return hits
    start, count = start[rivals], count[rivals]
    first = np.cumsum(count) - count  # where each one's pairs begin
    pair = np.arange(count.sum())
    annotated = by_frame[pair - np.repeat(first - start, count)]
    overlap = paired_iou(boxes[annotated], found_boxes[order][np.repeat(rivals, count)])
    best = np.maximum.reduceat(overlap, first)  # (rivals,)
    winner = np.minimum.reduceat(np.where(overlap == np.repeat(best, count), pair, len(pair)), first)
    enough = best >= iou
    _, earliest = np.unique(annotated[winner[enough]], return_index=True)
    hits[rivals[enough][earliest]] = True
    return hits


def average_precision(hits: npt.NDArray[np.bool_], annotated: int) -> float:
    """Area under the precision-recall curve, precision made to fall with recall first (VOC 2010).

    hits: (n,) right or wrong, the highest score first.
    """
    right = np.cumsum(hits)
    recall = np.concatenate([[0.0], right / annotated, [1.0]])
    precision = np.concatenate([[0.0], right / np.arange(1, len(hits) + 1), [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))
