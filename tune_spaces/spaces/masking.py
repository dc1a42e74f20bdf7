"""What is hidden from whom: both mask ratios, in every space valid by construction.

The teacher sees at least what the student sees, so its ratio is clamped at the student's: symmetric masks. Ratios that
hide equal counts of cells become equal, and the student never has none or all cells hidden. A small grid has few
counts; ratios that come to the same count are offered once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from amd.config import TrainConfig
from tune_spaces.config import Dimension
from tune_spaces.spaces.parameter import Word

STUDENT_RATIOS = (0.5, 0.75, 0.85, 0.9, 0.95)
TEACHER_RATIOS = (0.0, 0.25, 0.5, 0.6, 0.75, 0.8, 0.85, 0.9, 0.95)
"""0: the full view. At or above the student's: symmetric."""

WORDS = {
    "masking.student_ratio": Word(("mask.student_ratio",), lambda config: config.mask.student_ratio),
    "masking.teacher_ratio": Word(("mask.teacher_ratio",), lambda config: config.mask.teacher_ratio),
}
KEYS = ("mask.student_ratio", "mask.teacher_ratio")
"""As dimensions of one's own they are clamped too."""


def dimensions(base: TrainConfig) -> dict[str, Dimension]:
    return {
        "masking.student_ratio": Dimension(choices=_offered(STUDENT_RATIOS, base.mask.student_ratio, base, least=1)),
        "masking.teacher_ratio": Dimension(choices=_offered(TEACHER_RATIOS, base.mask.teacher_ratio, base, least=0)),
    }


def _offered(ratios: tuple[float, ...], own: float, base: TrainConfig, least: int) -> tuple[float, ...]:
    """One ratio for each count of cells, the base's own first of all."""
    by_count: dict[int, float] = {}
    for ratio in (own, *ratios):
        by_count.setdefault(base.mask.hidden_cells(ratio, base.cells), ratio)
    return tuple(sorted(ratio for count, ratio in by_count.items() if least <= count < base.cells))


def overrides(point: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Both ratios, from words or keys of the point, else as `config` has them; made to fit its cells."""
    student = _chosen(point, "student_ratio", config.mask.student_ratio)
    teacher = _chosen(point, "teacher_ratio", config.mask.teacher_ratio)
    if _is_ratio(student) and _is_ratio(teacher):  # others are refused where the config is built
        student, teacher = fitting(float(student), float(teacher), config)
    return {"mask.student_ratio": student, "mask.teacher_ratio": teacher}


def _chosen(point: Mapping[str, Any], ratio: str, own: float) -> Any:
    return point.get(f"masking.{ratio}", point.get(f"mask.{ratio}", own))


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def fitting(student: float, teacher: float, config: TrainConfig) -> tuple[float, float]:
    """The nearest ratios that a config with these cells can have; the same ratios where it can have them."""
    cells, hidden = config.cells, config.mask.hidden_cells
    if cells > 1 and not 0 < hidden(student, cells) < cells:
        student = ratio_of(min(max(hidden(student, cells), 1), cells - 1), cells)
    teacher = min(teacher, student)
    if hidden(teacher, cells) == hidden(student, cells):
        teacher = student
    return student, teacher


def ratio_of(count: int, cells: int) -> float:
    """The smallest ratio that hides so many cells, truncation and rounding considered."""
    ratio = count / cells
    while int(ratio * cells) < count:
        ratio = math.nextafter(ratio, 1)
    return ratio
