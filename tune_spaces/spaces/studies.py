"""The paper's questions as studies: one dimension, `variant`, whose choices are a few named points.

A variant is a point in words of the spaces or keys of a config; the base's own values are among the variants of every
study. Names of variants are unique over all studies: a name alone tells what is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from amd.config import Distance, TrainConfig
from tune_spaces.config import StudyName
from tune_spaces.spaces.alignment import own_layers
from tune_spaces.spaces.generator import DEPTHS
from tune_spaces.spaces.parameter import Point, with_own

VARIANT = "variant"
OFFICIAL_SHARE = 0.75 / 0.9  # of what is hidden from the student, hidden from the teacher: AMD for video
STUDIED_LAYERS = ("last", "middle", "middle+last", "thirds", "quarters")

Variants = dict[str, Point]


def asymmetry(base: TrainConfig) -> Variants:
    """Is it worth it that the teacher sees more, and more still?"""
    student, teacher = base.mask.student_ratio, base.mask.teacher_ratio
    hidden = base.teacher_hidden_cells
    between = 0 < hidden < base.student_hidden_cells
    return {
        "asymmetric": {"masking.teacher_ratio": teacher if between else student * OFFICIAL_SHARE},
        "symmetric": {"masking.teacher_ratio": student},
        "full view": {"masking.teacher_ratio": 0.0 if hidden else teacher},
    }


def serial(base: TrainConfig) -> Variants:
    """Is it worth it to align twice, generation after direct?"""
    names = {"direct only": "direct", "generation only": "generation", "in series": "both"}
    return {name: {"alignment.branches": branches} for name, branches in names.items()}


def layers(base: TrainConfig) -> Variants:
    """Which blocks are aligned?"""
    return {name: {"alignment.layers": name} for name in (own_layers(base), *STUDIED_LAYERS)}


def distance(base: TrainConfig) -> Variants:
    """How are features compared?"""
    return {name: {"objective.distance": name} for name in get_args(Distance)}


def generator_depth(base: TrainConfig) -> Variants:
    """How deep are generators?"""
    depths = with_own(DEPTHS, base.student.generator.depth)
    return {f"depth {depth}": {"student.generator.depth": depth} for depth in depths}


def reduction(base: TrainConfig) -> Variants:
    """Are layer pairs summed (the paper) or averaged (its code)?"""
    return {name: {"objective.reduction": name} for name in ("sum", "mean")}


STUDIES: dict[StudyName, Callable[[TrainConfig], Variants]] = {
    "asymmetry": asymmetry,
    "serial": serial,
    "layers": layers,
    "distance": distance,
    "generator_depth": generator_depth,
    "reduction": reduction,
}


def variants(base: TrainConfig) -> Variants:
    """Of all studies."""
    return {name: point for study in STUDIES.values() for name, point in study(base).items()}
