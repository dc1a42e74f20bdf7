"""Studies: the paper's ablations, each as a single dimension, `variant`, whose choices are named points.

A variant sets space parameters or config keys; every study includes the base config's values. Names are unique across
studies, so a name alone identifies a variant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from amd.config import Distance, TrainConfig
from tune_spaces.config import StudyName
from tune_spaces.spaces.alignment import current_layers
from tune_spaces.spaces.generator import DEPTHS
from tune_spaces.spaces.parameter import Point, with_current

VARIANT = "variant"
OFFICIAL_RATIO = 0.75 / 0.9  # teacher ratio / student ratio, as in AMD for video
STUDIED_LAYERS = ("last", "middle", "middle+last", "thirds", "quarters")

Variants = dict[str, Point]


def asymmetry(base: TrainConfig) -> Variants:
    """Vary what the teacher sees beyond the student's tokens: nothing, some, or all of the remaining tokens."""
    student, teacher = base.mask.student_ratio, base.mask.teacher_ratio
    hidden = base.teacher_hidden_cells
    between = 0 < hidden < base.student_hidden_cells
    return {
        "asymmetric": {"masking.teacher_ratio": teacher if between else student * OFFICIAL_RATIO},
        "symmetric": {"masking.teacher_ratio": student},
        "full view": {"masking.teacher_ratio": 0.0 if hidden else teacher},
    }


def serial(base: TrainConfig) -> Variants:
    """Compare direct alignment, generation alignment, and both in series."""
    names = {"direct only": "direct", "generation only": "generation", "in series": "both"}
    return {name: {"alignment.branches": branches} for name, branches in names.items()}


def layers(base: TrainConfig) -> Variants:
    """Vary the aligned blocks."""
    return {name: {"alignment.layers": name} for name in (current_layers(base), *STUDIED_LAYERS)}


def distance(base: TrainConfig) -> Variants:
    """Vary the function that measures the distance between features."""
    return {name: {"objective.distance": name} for name in get_args(Distance)}


def generator_depth(base: TrainConfig) -> Variants:
    """Vary the generator depth."""
    depths = with_current(DEPTHS, base.student.generator.depth)
    return {f"depth {depth}": {"student.generator.depth": depth} for depth in depths}


def reduction(base: TrainConfig) -> Variants:
    """Compare the sum over layer pairs (as in the paper) with their mean (as in the official code)."""
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
    """Return the variants of all studies, by name."""
    return {name: point for study in STUDIES.values() for name, point in study(base).items()}
