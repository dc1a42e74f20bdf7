"""The `masking` space: mask ratios of student and teacher, valid by construction.

The teacher sees at least what the student sees, so its ratio is at most the student's; equal ratios give symmetric
masks. Ratios that hide the same number of cells become equal, and the student always has some cells hidden and some
visible. On a small grid, only one of several ratios with the same cell count is offered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from amd.config import TrainConfig
from tune_spaces.config import Dimension
from tune_spaces.spaces.parameter import Parameter

STUDENT_RATIOS = (0.5, 0.75, 0.85, 0.9, 0.95)
TEACHER_RATIOS = (0.0, 0.25, 0.5, 0.6, 0.75, 0.8, 0.85, 0.9, 0.95)
"""0 is the full view; values at or above the student's ratio give symmetric masks."""

PARAMETERS = {
    "masking.student_ratio": Parameter(("mask.student_ratio",), lambda config: config.mask.student_ratio),
    "masking.teacher_ratio": Parameter(("mask.teacher_ratio",), lambda config: config.mask.teacher_ratio),
}
CONFIG_KEYS = ("mask.student_ratio", "mask.teacher_ratio")
"""Config keys that are also clamped when used as custom dimensions."""


def dimensions(base: TrainConfig) -> dict[str, Dimension]:
    return {
        "masking.student_ratio": Dimension(
            choices=_distinct_ratios(STUDENT_RATIOS, base.mask.student_ratio, base, minimum=1)
        ),
        "masking.teacher_ratio": Dimension(
            choices=_distinct_ratios(TEACHER_RATIOS, base.mask.teacher_ratio, base, minimum=0)
        ),
    }


def _distinct_ratios(ratios: tuple[float, ...], current: float, base: TrainConfig, minimum: int) -> tuple[float, ...]:
    """Return one ratio for each number of hidden cells, preferring the base config's ratio."""
    by_count: dict[int, float] = {}
    for ratio in (current, *ratios):
        by_count.setdefault(base.mask.hidden_cells(ratio, base.cells), ratio)
    return tuple(sorted(ratio for count, ratio in by_count.items() if minimum <= count < base.cells))


def overrides(point: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Return overrides for both ratios, fitted to the config's number of cells.

    A ratio that is missing from the point is taken from `config`.
    """
    student = _ratio(point, "student_ratio", config.mask.student_ratio)
    teacher = _ratio(point, "teacher_ratio", config.mask.teacher_ratio)
    if _is_ratio(student) and _is_ratio(teacher):  # invalid values fail config validation
        student, teacher = fit_ratios(float(student), float(teacher), config)
    return {"mask.student_ratio": student, "mask.teacher_ratio": teacher}


def _ratio(point: Mapping[str, Any], name: str, current: float) -> Any:
    return point.get(f"masking.{name}", point.get(f"mask.{name}", current))


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def fit_ratios(student: float, teacher: float, config: TrainConfig) -> tuple[float, float]:
    """Return the nearest valid ratios for the config's number of cells; valid ratios are returned unchanged."""
    cells, hidden = config.cells, config.mask.hidden_cells
    if cells > 1 and not 0 < hidden(student, cells) < cells:
        student = ratio_for_count(min(max(hidden(student, cells), 1), cells - 1), cells)
    teacher = min(teacher, student)
    if hidden(teacher, cells) == hidden(student, cells):
        teacher = student
    return student, teacher


def ratio_for_count(count: int, cells: int) -> float:
    """Return the smallest ratio that hides `count` cells, allowing for truncation and rounding."""
    ratio = count / cells
    while int(ratio * cells) < count:
        ratio = math.nextafter(ratio, 1)
    return ratio
