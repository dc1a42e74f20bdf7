"""Demo presets for a laptop: teacher, AMD student and student without distillation, trained on digits in minutes.

All values are our defaults, since the paper has no runs of this size. They depart from the paper's recipes where small
runs require it: 2-D position embeddings with a small base, truncated-normal weights, plain pixel targets, and few,
large tokens. They were tuned by probes on the `select` split of the demo data. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amd.config import TrainConfig, validate

# Each halves the pixel loss after a few hundred steps, compared with VideoMAE (1-D positions, base 10000, xavier).
ENCODER = {"positions": "sincos_2d", "position_base": 100.0, "init": "trunc_normal"}
DECODER = {"width": 48, "depth": 2, "heads": 3}
TEACHER = {"size": "demo-teacher", **ENCODER}
STUDENT = {
    "encoder": {"size": "demo-student", **ENCODER},
    "decoder": DECODER,
    "generator": {"depth": 1, "heads": 4},
}
PIXELS = "normalized"  # targets normalised per token would amplify the noise of black tokens

IMAGE: dict[str, Any] = {
    "clip": {"frames": 1, "size": 32, "patch": 8, "tubelet": 1, "mean": (0.25,) * 3, "std": (0.35,) * 3},
    "data": {"train": "demo:digits"},
    "batch": 32,
}
VIDEO: dict[str, Any] = {
    # One token spans the whole clip: with several tokens along time, a token can be reconstructed from its neighbours
    # in the same frames, without learning motion.
    "clip": {
        "frames": 8,
        "size": 32,
        "patch": 8,
        "tubelet": 8,
        "sampling_rate_frames": 1,
        "mean": (0.35,) * 3,
        "std": (0.3,) * 3,
    },
    # Window sampling uses all 8 frames; strided sampling would repeat one of them.
    # Noise, because it cannot be predicted: masked modelling drops it, random weights and raw pixels keep it.
    "data": {"train": "demo:noisy-moving-digits", "sampling": "window", "repeats": 4},
    "batch": 16,  # 64 clips: 4 masks per decoded file
}


def _run(modality: dict[str, Any], steps: int, lr: float) -> dict[str, Any]:
    """Return the values shared by all three runs. `lr`: absolute peak learning rate, decayed to a hundredth."""
    scale = 256 / modality["batch"]
    return {
        "clip": modality["clip"],
        "data": {**modality["data"], "crop": "center", "loader_workers": 1},
        "optim": {
            "batch_size": modality["batch"],
            "base_lr": lr * scale,
            "min_lr": lr * scale / 100,
            "clip_norm": 1.0,
        },
        "schedule": {"steps": steps, "warmup_steps": steps // 10},
        "checkpoint": {"every_minutes": 0.5, "keep_last": 1},
        # One worker: averaging gradients over two would cost more than these small steps.
        "scaling": {"workers": 1, "threads_per_worker": 1, "device": "cpu"},
        "tracking": {"log_every_steps": 20, "guard_every_steps": 0, "tensorboard": False},
    }


def _teacher(modality: dict[str, Any], steps: int) -> TrainConfig:
    values = {
        **_run(modality, steps, lr=1.5e-3),
        "student": {"encoder": TEACHER, "decoder": DECODER},
        "mask": {"strategy": "random", "student_ratio": 0.5, "teacher_ratio": 0.5},
        "objective": {"kind": "mae", "pixels": PIXELS},
    }
    return validate(TrainConfig, values)


def _undistilled(modality: dict[str, Any], steps: int) -> dict[str, Any]:
    return {
        **_run(modality, steps, lr=2e-3),
        "student": STUDENT,
        "mask": {"strategy": "random", "student_ratio": 0.75, "teacher_ratio": 0.5},
        "objective": {"kind": "mae", "pixels": PIXELS},
    }


def _distilled(modality: dict[str, Any], steps: int, teacher: str, **objective: Any) -> TrainConfig:
    values = {
        **_undistilled(modality, steps),
        "teacher": {"encoder": TEACHER, "preset": teacher},
        "objective": {"kind": "amd", "pixels": PIXELS, "target_norm": "layer_norm", **objective},
    }
    return validate(TrainConfig, values)


def _pairs(*pairs: tuple[int, int]) -> list[dict[str, int]]:
    return [{"student": student, "teacher": teacher} for student, teacher in pairs]


def demo_image_teacher() -> TrainConfig:
    """MAE pre-training of a 128 x 6 encoder on 6000 jittered digits: 2000 steps, batch size 32; about 70 s."""
    return _teacher(IMAGE, steps=2000)


def demo_image_mae() -> TrainConfig:
    """MAE pre-training of a 64 x 4 student without distillation on the digits: 500 steps, batch size 32; about 10 s."""
    return validate(TrainConfig, _undistilled(IMAGE, steps=500))


def demo_image_amd() -> TrainConfig:
    """AMD pre-training of a 64 x 4 student on the digits: 500 steps, batch size 32; about 20 s, excluding the teacher.

    Aligns the middle and last blocks.
    """
    return _distilled(IMAGE, 500, "demo-image-teacher", layers=_pairs((2, 3), (4, 6)))


def demo_video_teacher() -> TrainConfig:
    """VideoMAE pre-training of a 128 x 6 encoder on 4000 noisy digit clips: 1000 steps, batch size 64; about 80 s."""
    return _teacher(VIDEO, steps=1000)


def demo_video_mae() -> TrainConfig:
    """VideoMAE pre-training of a 64 x 4 student without distillation: 150 steps, batch size 64; about 10 s."""
    return validate(TrainConfig, _undistilled(VIDEO, steps=150))


def demo_video_amd() -> TrainConfig:
    """AMD pre-training of a 64 x 4 student on the clips: 150 steps, batch size 64; about 15 s, excluding the teacher.

    Aligns the middle and last blocks, where the teacher's nearest-neighbour accuracy is highest (43%, versus 36% after
    block 1). Direct alignment has weight 10, because normalised targets keep its loss at a tenth of the other terms.
    """
    weights = {"reconstruction": 1.0, "direct": 10.0, "generation": 1.0}
    return _distilled(VIDEO, 150, "demo-video-teacher", layers=_pairs((2, 3), (4, 6)), weights=weights)


DEMO_PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "demo-image-teacher": demo_image_teacher,
    "demo-image-mae": demo_image_mae,
    "demo-image-amd": demo_image_amd,
    "demo-video-teacher": demo_video_teacher,
    "demo-video-mae": demo_video_mae,
    "demo-video-amd": demo_video_amd,
}
