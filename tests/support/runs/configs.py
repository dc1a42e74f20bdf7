"""Tiny but complete configs for tests. A training step takes a few milliseconds."""

from __future__ import annotations

from typing import Any

from amd.config import TrainConfig, validate, with_overrides

TINY_STUDENT = {"width": 48, "depth": 4, "heads": 3}
TINY_TEACHER = {"width": 64, "depth": 4, "heads": 2}


def tiny_video_config(**overrides: Any) -> TrainConfig:
    """Return a video config: 4 frames of 16x16, patch 4, tubelet 2, so 32 tokens in a (2, 4, 4) grid.

    Override keys use __ in place of dots.
    """
    values = {
        "clip": {"frames": 4, "size": 16, "patch": 4, "tubelet": 2, "sampling_rate_frames": 1},
        "student": {
            "encoder": TINY_STUDENT,
            "decoder": {"width": 32, "depth": 2, "heads": 2},
            "generator": {"depth": 2, "heads": 1},
        },
        "teacher": {"encoder": TINY_TEACHER, "weights": "teacher.safetensors"},
        "mask": {"strategy": "tube", "student_ratio": 0.75, "teacher_ratio": 0.6},
        "objective": {"kind": "amd", "layers": [{"student": 2, "teacher": 2}, {"student": 4, "teacher": 4}]},
        "data": {"train": "demo:moving-digits", "loader_workers": 0},
        "optim": {"batch_size": 8, "base_lr": 1e-3},
        "schedule": {"steps": 4},
        "scaling": {"device": "cpu"},
    }
    return _with(validate(TrainConfig, values), overrides)


def tiny_image_config(**overrides: Any) -> TrainConfig:
    """Return an MAE image config: 16x16, patch 4 (16 tokens), class token, 2-D position embeddings, joint targets.

    Override keys use __ in place of dots.
    """
    values = {
        "clip": {"frames": 1, "size": 16, "patch": 4, "tubelet": 1},
        "student": {
            "encoder": {**TINY_STUDENT, "class_token": True, "positions": "sincos_2d"},
            "decoder": {"width": 32, "depth": 2, "heads": 2, "input_bias": True},
            "generator": {"depth": 1, "heads": 1},
        },
        "teacher": {
            "encoder": {**TINY_TEACHER, "class_token": True, "positions": "sincos_2d"},
            "weights": "teacher.safetensors",
        },
        "mask": {"strategy": "random", "student_ratio": 0.75, "teacher_ratio": 0.5},
        "objective": {
            "kind": "amd",
            "pixels": "per_patch",
            "layers": [{"student": 2, "teacher": 2}, {"student": 4, "teacher": 4}],
        },
        "data": {"train": "demo:digits", "loader_workers": 0, "crop": "random_resized"},
        "optim": {"batch_size": 8, "base_lr": 1e-3},
        "schedule": {"steps": 4},
        "scaling": {"device": "cpu"},
    }
    return _with(validate(TrainConfig, values), overrides)


def mae(config: TrainConfig, **overrides: Any) -> TrainConfig:
    """Return the config with the same student but no teacher."""
    return _with(with_overrides(config, {"teacher": None, "objective.kind": "mae"}), overrides)


def _with(config: TrainConfig, overrides: dict[str, Any]) -> TrainConfig:
    return with_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})
