"""Demo data sets of handwritten digits: PNG image folders, and H.264 clips labelled by motion.

`digits` contains 32x32 images labelled by digit. `moving-digits` contains mp4 clips of 8 frames in which one digit
moves over a torus (leaving on one side, entering on the other) in one of 8 directions; the label is the direction,
which no single frame reveals. `noisy-digits` and `noisy-moving-digits` show the same samples in grey, with independent
noise in every pixel, so the noise cannot be predicted from other pixels. Source: scikit-learn's digits (UCI Optical
Recognition of Handwritten Digits, CC BY 4.0), 1797 images of 8x8 pixels that ship with the package, so nothing is
downloaded.

The files are read like any other data set. Does not import models or loaders.
Shapes: N samples, T frames, S frame side in pixels.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from amd.data.dataset.clip_files import LIST, write_clips
from amd.file_lock import exclusive_lock

DemoName = Literal["digits", "moving-digits", "noisy-digits", "noisy-moving-digits"]
DemoSplit = Literal["train", "probe", "few", "select", "test"]
Array: TypeAlias = npt.NDArray[np.float32]
Pixels: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.int64]

VERSION = 1  # part of the folder name; bump it when the pixels change
SIDE = 32
FRAMES = 8
SPEEDS = (1.5, 3.0)  # pixels per frame
GREY = (0.25, 0.75)  # brightness of background and digit under noise, from 0 (black) to 1 (white)
NOISE = 0.15  # standard deviation of the noise
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")

# Digits are split once, by a fixed permutation. `train` (pre-training), `probe` (labelled samples for probes) and `few`
# (fine-tuning) draw from the same digits. Hyperparameters were selected on `select`, never on `test`.
DIGIT_RANGES: dict[str, tuple[int, int]] = {
    "train": (0, 1097),
    "probe": (0, 1097),
    "few": (0, 1097),
    "select": (1097, 1397),
    "test": (1397, 1797),
}
IMAGES: dict[str, int] = {"train": 6000, "probe": 1097, "few": 100, "select": 300, "test": 400}
CLIPS: dict[str, int] = {"train": 4000, "probe": 1000, "few": 80, "select": 600, "test": 800}
SPLIT_SEEDS: dict[str, int] = {"train": 1, "probe": 2, "select": 3, "test": 4, "few": 5}


class Samples(NamedTuple):
    pixels: Pixels  # (N, T, S, S) grey; T is 1 for images
    labels: Labels  # (N,)
    digits: Labels  # (N,) index among the 1797 source digits


def demo_root() -> Path:
    """Return AMD_DEMO_DIR if set, else a folder in the user's cache directory."""
    if root := os.environ.get("AMD_DEMO_DIR"):
        return Path(root).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "amd" / "demo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amd" / "demo"


def ensure_demo(name: str, split: str = "train") -> str:
    """Return the path to open as a manifest: a folder of PNG files grouped by class, or a list file of clips.

    The data is written atomically on first use, which takes a few seconds; concurrent processes wait for the writer.
    `val` is an alias of `select`. Raises ValueError for an unknown name or split.
    """
    split = "select" if split == "val" else split
    if name not in WRITERS or split not in get_args(DemoSplit):
        raise ValueError(
            f"demo:{name}/{split} does not exist: valid names are {', '.join(WRITERS)}, "
            f"valid splits are {', '.join(get_args(DemoSplit))}"
        )
    folder = demo_root() / f"{name}-{VERSION}"
    target = folder / split
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / f".{split}.lock"):
            if not target.exists():
                for leftover in folder.glob(f".{split}.part-*"):  # from a process that died while writing
                    shutil.rmtree(leftover)
                part = folder / f".{split}.part-{uuid.uuid4().hex[:8]}"
                WRITERS[name](part, split)
                os.replace(part, target)
    return str(target / LIST) if name.endswith("moving-digits") else str(target)


def image_samples(split: str, count: int | None = None) -> Samples:
    """Generate a split's digits as 32x32 images, labelled by digit.

    The `train` split is jittered (shift +-2 pixels, scale 0.85 to 1.1, rotation +-0.2 rad); other splits are not.
    """
    images, classes = _digits()
    chosen, rng = _choose(split, count or IMAGES[split])
    number = len(chosen)
    centre = np.full((number, 1, 2), (SIDE - 1) / 2, np.float32)
    side = np.full(number, SIDE, np.float32)
    angle = np.zeros(number, np.float32)
    if split == "train":
        centre += rng.uniform(-2, 2, centre.shape).astype(np.float32)
        side *= rng.uniform(0.85, 1.1, number).astype(np.float32)
        angle += rng.uniform(-0.2, 0.2, number).astype(np.float32)
    return Samples(render(images[chosen], centre, side, angle, wrap=False), classes[chosen], chosen)


def clip_samples(split: str, count: int | None = None) -> Samples:
    """Generate a split's moving digits, (N, 8, 32, 32), labelled by direction (see DIRECTIONS).

    Digits of 22 to 28 pixels, rotated by up to 0.2 rad, move 1.5 to 3 pixels per frame. The start is uniform on the
    torus and independent of the direction, so single frames have the same distribution for every label.
    """
    images, _ = _digits()
    chosen, rng = _choose(split, count or CLIPS[split])
    number = len(chosen)
    labels = np.arange(number, dtype=np.int64) % len(DIRECTIONS)
    rng.shuffle(labels)
    heading = labels * (2 * np.pi / len(DIRECTIONS))
    velocity = rng.uniform(*SPEEDS, (number, 1)) * np.stack([np.sin(heading), np.cos(heading)], axis=1)  # (N, 2) y, x
    # Time is relative to the middle of the clip, where the position is uniform.
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    centre = rng.uniform(0, SIDE, (number, 1, 2)) + velocity[:, None] * time[None, :, None]  # (N, T, 2)
    side = rng.uniform(22, 28, number)
    angle = rng.uniform(-0.2, 0.2, number)
    return Samples(render(images[chosen], centre, side, angle, wrap=True), labels, chosen)


def add_noise(pixels: Pixels, split: str) -> Pixels:
    """Render samples (N, T, S, S) of a split in grey, and add independent Gaussian noise to every pixel."""
    rng = np.random.default_rng([SPLIT_SEEDS[split], 1])
    dark, bright = GREY
    noisy = np.empty_like(pixels)
    for start in range(0, len(pixels), 256):
        rows = slice(start, start + 256)
        grey = dark + (bright - dark) / 255 * pixels[rows].astype(np.float32)
        grey += rng.normal(0, NOISE, grey.shape).astype(np.float32)
        noisy[rows] = np.rint(grey.clip(0, 1) * 255).astype(np.uint8)
    return noisy


def render(
    digits: Array,
    centre: npt.NDArray[np.floating],
    side: npt.NDArray[np.floating],
    angle: npt.NDArray[np.floating],
    *,
    wrap: bool,
) -> Pixels:
    """Render 8x8 digits on black frames with bilinear interpolation.

    digits (N, 8, 8) in [0, 1], centre (N, T, 2) as y, x in pixels, side (N,) of the drawn digit in pixels, angle (N,)
    in rad -> (N, T, S, S). `wrap` draws on a torus.
    """
    number, frames = centre.shape[:2]
    out = np.empty((number, frames, SIDE, SIDE), np.uint8)
    padded = np.pad(digits, ((0, 0), (1, 1), (1, 1)))  # a black border, so that pixels outside the digit are black
    axis = np.arange(SIDE, dtype=np.float32)
    for start in range(0, number, 256):
        rows = slice(start, start + 256)
        away = axis[None, None, None] - centre[rows, :, :, None].astype(np.float32)  # (n, T, 2, S)
        if wrap:
            away = (away + SIDE / 2) % SIDE - SIDE / 2
        dy, dx = away[:, :, 0, :, None], away[:, :, 1, None, :]  # (n, T, S, 1), (n, T, 1, S)
        turn = angle[rows, None, None, None].astype(np.float32)
        scale = (8 / side[rows, None, None, None]).astype(np.float32)
        y = (np.cos(turn) * dy - np.sin(turn) * dx) * scale + 3.5 + 1  # (n, T, S, S) in the padded source
        x = (np.sin(turn) * dy + np.cos(turn) * dx) * scale + 3.5 + 1
        out[rows] = np.rint(_bilinear(padded[rows], y, x) * 255).astype(np.uint8)
    return out


def _bilinear(images: Array, y: npt.NDArray[np.floating], x: npt.NDArray[np.floating]) -> Array:
    """Sample (n, H, W) images at (n, T, S, S) coordinates, clamped to the border."""
    last = images.shape[-1] - 1
    y, x = np.clip(y, 0, last), np.clip(x, 0, last)
    top, left = np.minimum(y.astype(np.int64), last - 1), np.minimum(x.astype(np.int64), last - 1)
    down, right = y - top, x - left
    n = np.arange(len(images))[:, None, None, None]
    upper = images[n, top, left] * (1 - right) + images[n, top, left + 1] * right
    lower = images[n, top + 1, left] * (1 - right) + images[n, top + 1, left + 1] * right
    result: Array = (upper * (1 - down) + lower * down).astype(np.float32)
    return result


def _digits() -> tuple[Array, Labels]:
    from sklearn.datasets import load_digits  # slow import: about a second

    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)


def _choose(split: str, count: int) -> tuple[Labels, np.random.Generator]:
    """Choose a split's digits, balanced across classes; also return the split's random generator."""
    order = np.random.default_rng(20_240_311).permutation(1797)
    start, stop = DIGIT_RANGES[split]
    rng = np.random.default_rng(SPLIT_SEEDS[split])
    rounds = [rng.permutation(order[start:stop]) for _ in range(-(-count // (stop - start)))]
    return np.concatenate(rounds)[:count].astype(np.int64), rng


def write_digits(folder: Path, split: str, count: int | None = None, *, noisy: bool = False) -> None:
    """Write 32x32 RGB images to `folder/LABEL/NNNNN.png`."""
    from PIL import Image

    samples = image_samples(split, count)
    if noisy:
        samples = samples._replace(pixels=add_noise(samples.pixels, split))
    for label in range(10):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for i, (pixels, label) in enumerate(zip(samples.pixels, samples.labels, strict=True)):
        Image.fromarray(pixels[0]).convert("RGB").save(folder / str(label) / f"{i:05}.png")


def write_moving_digits(folder: Path, split: str, count: int | None = None, *, noisy: bool = False) -> None:
    """Write a split's clips and the list file."""
    samples = clip_samples(split, count)
    pixels = add_noise(samples.pixels, split) if noisy else samples.pixels
    write_clips(folder, pixels, samples.labels.tolist())


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "digits": write_digits,
    "moving-digits": write_moving_digits,
    "noisy-digits": partial(write_digits, noisy=True),
    "noisy-moving-digits": partial(write_moving_digits, noisy=True),
}
