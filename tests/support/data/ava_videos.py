"""Tiny synthetic videos in AVA layout, in which one bright square moves right (action 1) and another down (action 3).

Either square may be on the left or the right, so only a model that reads the pixels in each box can classify them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from amd.config import DetectionConfig, validate, with_overrides
from tests.support.data.videos import write_video

WIDTH, HEIGHT, SIDE, FRAMES, FPS = 64, 48, 12, 24, 8
RIGHT, NEVER, DOWN = 1, 2, 3
NAMES = {RIGHT: "go right", NEVER: "never", DOWN: "go down"}

Corner = tuple[int, int]  # (left, top)


def squares_at(number: int, frame: int) -> dict[int, Corner]:
    """Return the corner of each action's square; the square moving right is on the left in even-numbered videos."""
    wobble = number % 4
    if number % 2 == 0:
        return {RIGHT: (2 + frame, 2 + 8 * wobble), DOWN: (44 + wobble, 2 + frame)}
    return {RIGHT: (26 + frame, 2 + 8 * wobble), DOWN: (2 + wobble, 2 + frame)}


def picture(corners: list[Corner], width: int = WIDTH, height: int = HEIGHT, side: int = SIDE) -> np.ndarray:
    frame = np.full((height, width, 3), 20, np.uint8)
    for left, top in corners:
        frame[top : top + side, left : left + side] = (250, 240, 230)
    return frame


def fractions(corner: Corner) -> str:
    left, top = corner
    return f"{left / WIDTH},{top / HEIGHT},{(left + SIDE) / WIDTH},{(top + SIDE) / HEIGHT}"


def label_map(*numbers: int) -> str:
    return "".join(f'item {{\n  name: "{NAMES[number]}"\n  id: {number}\n}}\n' for number in numbers)


def draw(folder: Path, videos: int = 8, seconds: tuple[int, ...] = (1, 2)) -> Path:
    """Write videos (v0.mp4 …), train.csv, val.csv (the last two videos), detected boxes (boxes.csv) and map.pbtxt."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "val": [], "boxes": []}
    for number in range(videos):
        frames = [picture(list(squares_at(number, n).values())) for n in range(FRAMES)]
        write_video(folder / f"v{number}.mp4", frames, fps=FPS)
        for second in seconds:
            key_frame = f"v{number},{second:04d}"
            for action, corner in squares_at(number, second * FPS).items():
                is_val = number >= videos - 2
                lines["val" if is_val else "train"].append(f"{key_frame},{fractions(corner)},{action},{action}")
                lines["boxes"] += [f"{key_frame},{fractions(corner)},,0.95"] if is_val else []
            lines["boxes"].append(f"{key_frame},0,0,1,1,,0.3")  # score below the threshold
    for name, content in lines.items():
        (folder / f"{name}.csv").write_text("\n".join(content) + "\n")
    (folder / "map.pbtxt").write_text(label_map(*NAMES))
    return folder


def tiny_detection(folder: Path, **overrides: Any) -> DetectionConfig:
    """Return a detection config for 6 steps on 12 key frames, 3 steps per epoch, with clips of four 32x32 frames.

    Patches of 8 pixels give a (2, 4, 4) grid. Override keys use __ in place of dots.
    """
    values: dict[str, Any] = {
        "clip": {"frames": 4, "size": 32, "patch": 8, "tubelet": 2, "sampling_rate_frames": 4},
        "encoder": {"width": 48, "depth": 2, "heads": 3, "positions": "sincos_3d", "drop_path": 0.1},
        "head": {"init_scale": 1.0},
        "data": {
            "train": str(folder / "train.csv"),
            "val": str(folder / "val.csv"),
            "boxes": str(folder / "boxes.csv"),
            "label_map": str(folder / "map.pbtxt"),
            "short_side": 36,
            "loader_workers": 0,
        },
        "optim": {"batch_size": 4, "base_lr": 0.1},
        "schedule": {"steps": 6, "warmup_steps": 1},
        "evaluation": {"batch_size": 3, "size": (40, 48)},
        "checkpoint": {"every_minutes": None},
        "scaling": {"device": "cpu", "threads_per_worker": 1},
        "tracking": {"log_every_steps": 2, "tensorboard": False},
        "storage": str(folder / "storage"),
    }
    config = validate(DetectionConfig, values)
    return with_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})
