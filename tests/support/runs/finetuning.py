"""Fine-tuning runs that take a few seconds, in which a tiny encoder classifies images or clips as dark or bright."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from amd.config import FinetuneConfig, validate, with_overrides
from tests.support.data.videos import pictures, write_video

CLASSES = ("dark", "bright")
ENCODER = {"width": 24, "depth": 2, "heads": 3, "drop_path": 0.2}


def shaded_images(folder: Path, count: int, *, names: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """Write PNG files of 20x20 noise, half of them dark and half bright, into class folders called `names`."""
    noise = np.random.default_rng(seed)
    for i in range(count):
        path = folder / names[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise.integers(0, 128, (20, 20, 3)) + 128 * (i % 2)).astype(np.uint8)).save(path)
    return folder


def shaded_clips(folder: Path, count: int, frames: int = 8) -> Path:
    """Write clips of 32x24 pixels, half of them dark and half bright."""
    for i in range(count):
        path = folder / CLASSES[i % 2] / f"{i:03d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [frame // 2 + 128 * (i % 2) for frame in pictures(frames, 32, 24, seed=i)])
    return folder


def tiny_finetuning(folder: Path, **overrides: Any) -> FinetuneConfig:
    """Return a config for 12 steps on 24 images, 3 steps per epoch, with data and storage in `folder`.

    Override keys use __ in place of dots.
    """
    if not (folder / "train").exists():
        shaded_images(folder / "train", 24)
        shaded_images(folder / "val", 10, seed=1)
    values: dict[str, Any] = {
        "clip": {"frames": 1, "size": 16, "patch": 4, "tubelet": 1},
        "encoder": ENCODER,
        "head": {"classes": 2, "init_scale": 1.0},
        "data": {
            "train": str(folder / "train"),
            "val": str(folder / "val"),
            "loader_workers": 0,
            "crop": "random_resized",
            "flip": True,
        },
        "augment": {"erase_prob": 0.5},
        "optim": {"batch_size": 8, "base_lr": 0.1},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "evaluation": {"batch_size": 4},
        "checkpoint": {"every_minutes": None},
        "scaling": {"device": "cpu", "threads_per_worker": 1},
        "tracking": {"log_every_steps": 1, "tensorboard": False},
        "storage": str(folder / "storage"),
    }
    return with_overrides(
        validate(FinetuneConfig, values), {key.replace("__", "."): value for key, value in overrides.items()}
    )
