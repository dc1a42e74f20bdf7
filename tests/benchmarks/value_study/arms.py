"""Ways to train the student in the value study, and their configs."""

from __future__ import annotations

from typing import Any, NamedTuple

from amd.config import TrainConfig, validate, with_overrides

ENCODER = {"positions": "sincos_2d", "position_base": 100.0, "init": "trunc_normal"}
PIXEL_MEAN, PIXEL_STD = (0.286,) * 3, (0.353,) * 3  # of Fashion-MNIST
CLIP: dict[str, Any] = {"frames": 1, "size": 28, "tubelet": 1, "mean": PIXEL_MEAN, "std": PIXEL_STD}
BASE: dict[str, Any] = {
    "student": {
        "encoder": {"size": "demo-student", **ENCODER},
        "decoder": {"width": 48, "depth": 2, "heads": 3},
        "generator": {"depth": 1, "heads": 4},
    },
    "data": {"train": "unused"},
    "mask": {"strategy": "random", "student_ratio": 0.85, "teacher_ratio": 0.6},
    "optim": {"batch_size": 64, "base_lr": 2e-3 * 4, "min_lr": 2e-5 * 4, "clip_norm": 1.0},
    "scaling": {"device": "cpu", "threads_per_worker": 1},
}
TEACHER_ENCODER = {"size": "demo-teacher", **ENCODER}
PAIRS = [{"student": 2, "teacher": 3}, {"student": 4, "teacher": 6}]
UNDISTILLED: dict[str, Any] = {"objective": {"kind": "mae", "pixels": "normalized"}}
DISTILLED: dict[str, Any] = {
    "teacher": {"encoder": TEACHER_ENCODER, "weights": "unused"},
    "objective": {"kind": "amd", "pixels": "normalized", "target_norm": "layer_norm", "layers": PAIRS},
}


class Variant(NamedTuple):
    """Settings that are the same for all arms of a table."""

    steps: int = 800
    """Training steps of the students."""
    teacher_steps: int = 2000
    patch: int = 4

    @property
    def suffix(self) -> str:
        """Part of a folder's name that distinguishes this variant from the default; empty for the default."""
        named = zip(("steps", "teacher", "patch"), self, Variant(), strict=True)
        return "".join(f"-{name}{value}" for name, value, default in named if value != default)


class StudyArm(NamedTuple):
    """One way to train the student for a seed."""

    values: dict[str, Any]
    overrides: dict[str, Any]
    as_long_as: tuple[str, ...] = ()
    """Arms (or `teacher`) whose total CPU time this arm trains for. Empty: the usual number of steps."""


def _ratios(student: float, teacher: float) -> dict[str, Any]:
    return {"mask.student_ratio": student, "mask.teacher_ratio": teacher}


ARMS: dict[str, StudyArm] = {
    "undistilled": StudyArm(UNDISTILLED, {}),
    "asymmetric": StudyArm(DISTILLED, {}),
    "symmetric": StudyArm(DISTILLED, _ratios(0.85, 0.85)),
    "full view": StudyArm(DISTILLED, _ratios(0.85, 0.0)),
    "undistilled, student's time": StudyArm(UNDISTILLED, {}, ("asymmetric",)),
    "undistilled, symmetric's time": StudyArm(UNDISTILLED, {}, ("symmetric",)),
    "undistilled, all time": StudyArm(UNDISTILLED, {}, ("asymmetric", "teacher")),
    "direct only": StudyArm(DISTILLED, {"objective.weights.generation": 0.0}),
    "generation only": StudyArm(DISTILLED, {"objective.weights.direct": 0.0}),
    "last layer": StudyArm(DISTILLED, {"objective.layers": [PAIRS[1]]}),
    "middle layer": StudyArm(DISTILLED, {"objective.layers": [PAIRS[0]]}),
    "asymmetric, 0.85 and 0.75": StudyArm(DISTILLED, _ratios(0.85, 0.75)),
    "asymmetric, 0.75 and 0.5": StudyArm(DISTILLED, _ratios(0.75, 0.5)),
    "symmetric, 0.75": StudyArm(DISTILLED, _ratios(0.75, 0.75)),
    "undistilled, 0.75": StudyArm(UNDISTILLED, {"mask.student_ratio": 0.75}),
    "asymmetric, 0.9 and 0.75": StudyArm(DISTILLED, _ratios(0.9, 0.75)),
    "asymmetric, 0.9 and 0.6": StudyArm(DISTILLED, _ratios(0.9, 0.6)),
    "symmetric, 0.9": StudyArm(DISTILLED, _ratios(0.9, 0.9)),
    "undistilled, 0.9": StudyArm(UNDISTILLED, {"mask.student_ratio": 0.9}),
}
HEADLINE = tuple(ARMS)[:6]

COMPARISONS = (
    ("asymmetric", "undistilled"),
    ("asymmetric", "undistilled, student's time"),
    ("asymmetric", "undistilled, all time"),
    ("asymmetric", "symmetric"),
    ("symmetric", "undistilled"),
    ("symmetric", "undistilled, symmetric's time"),
    ("asymmetric", "full view"),
    ("asymmetric, 0.85 and 0.75", "symmetric"),
    ("asymmetric, 0.75 and 0.5", "symmetric, 0.75"),
    ("asymmetric, 0.75 and 0.5", "undistilled, 0.75"),
    ("asymmetric, 0.9 and 0.75", "symmetric, 0.9"),
    ("asymmetric, 0.9 and 0.6", "symmetric, 0.9"),
    ("asymmetric, 0.9 and 0.75", "undistilled, 0.9"),
    ("asymmetric", "direct only"),
    ("asymmetric", "generation only"),
    ("asymmetric", "last layer"),
    ("asymmetric", "middle layer"),
)


def config_of(arm: StudyArm, seed: int, patch: int, steps: int) -> TrainConfig:
    schedule = {"schedule": {"steps": steps, "warmup_steps": steps // 10}, "clip": {**CLIP, "patch": patch}}
    return with_overrides(validate(TrainConfig, {**BASE, **arm.values, **schedule, "seed": seed}), arm.overrides)


def teacher_config(seed: int, patch: int, steps: int) -> TrainConfig:
    overrides = {
        "student.encoder": TEACHER_ENCODER,
        "mask.student_ratio": 0.75,
        "mask.teacher_ratio": 0.75,
        "optim.base_lr": 1.5e-3 * 4,
    }
    return config_of(StudyArm(UNDISTILLED, overrides), seed, patch, steps)
