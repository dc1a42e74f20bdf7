"""Box arithmetic in NumPy.

Boxes are arrays (n, 4) of x1, y1, x2, y2 in any unit; a box covers x1 <= x < x2, so its width is x2 - x1.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.floating[Any]]
Pair = tuple[float, float]  # applies to widths and heights


def scale(boxes: Boxes, x: float, y: float) -> Boxes:
    return np.asarray(boxes * np.array([x, y, x, y]))


def shift(boxes: Boxes, x: float, y: float) -> Boxes:
    return np.asarray(boxes + np.array([x, y, x, y]))


def mirror(boxes: Boxes, width: float) -> Boxes:
    """Mirror boxes horizontally in a frame of the given width."""
    mirrored = boxes.copy()
    mirrored[:, [0, 2]] = width - boxes[:, [2, 0]]
    return mirrored


def clip(boxes: Boxes, width: float, height: float) -> Boxes:
    """Clip boxes to the frame; a box outside it has no area."""
    return np.asarray(boxes.clip(0, np.array([width, height, width, height])))


def extend(boxes: Boxes, by: Pair) -> Boxes:
    """Enlarge width and height by the given fractions, keeping the centre."""
    margin = sides(boxes) * (np.array(by) / 2)  # (n, 2)
    return np.asarray(boxes + np.concatenate([-margin, margin], axis=1))


def jitter(boxes: Boxes, outwards: Pair, inwards: Pair, draws: random.Random) -> Boxes:
    """Move each side independently, outwards or inwards by up to these fractions of the box's width and height."""
    size = sides(boxes)
    moved = boxes.copy()
    for row in range(len(boxes)):
        for axis in (0, 1):
            low, high = (draws.uniform(-inwards[axis], outwards[axis]) * size[row, axis] for _ in range(2))
            moved[row, axis] -= low
            moved[row, 2 + axis] += high
    return moved


def sides(boxes: Boxes) -> Boxes:
    """Return widths and heights (n, 2)."""
    return np.asarray(boxes[:, 2:] - boxes[:, :2])


def have_area(boxes: Boxes) -> npt.NDArray[np.bool_]:
    return np.asarray((sides(boxes) > 0).all(axis=1))


def paired_iou(a: Boxes, b: Boxes) -> npt.NDArray[np.float64]:
    """Return the intersection over union of box i of `a` with box i of `b`: (n,)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    common = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(axis=1)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - common
    return np.asarray(common / union)
