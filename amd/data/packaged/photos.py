"""Labelled images: Fashion-MNIST (IDX files) and electroluminescence images of solar cells.

Shapes: N samples, H height, W width.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from amd.data.packaged.source import WriteOptions

Pixels: TypeAlias = npt.NDArray[np.uint8]

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # installed by the Debian package
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
FASHION_SELECT = 5000  # the last training images, for choosing settings
SELECT_SHARE, TEST_SHARE = 0.15, 0.25  # fractions of each class of solar cells


def locate_fashion_mnist() -> Path | None:
    return FASHION_FOLDER if FASHION_FOLDER.is_dir() else None


def write_fashion_mnist(source: Path, output: Path, options: WriteOptions) -> dict[str, int]:
    """Write SPLIT/CLASS/NNNNN.png: 55,000, 5,000 and 10,000 greyscale images of 28x28 pixels."""
    train, labels = read_idx(source / "train-images-idx3-ubyte.gz"), read_idx(source / "train-labels-idx1-ubyte.gz")
    test, test_labels = read_idx(source / "t10k-images-idx3-ubyte.gz"), read_idx(source / "t10k-labels-idx1-ubyte.gz")
    split = len(train) - FASHION_SELECT
    parts = {
        "train": (train[:split], labels[:split]),
        "select": (train[split:], labels[split:]),
        "test": (test, test_labels),
    }
    return {
        name: _write_images(output / name, images, classes, options.samples)
        for name, (images, classes) in parts.items()
    }


def read_idx(path: Path) -> Pixels:
    """Read a gzipped IDX file of bytes: (N,) labels, or (N, H, W) images. Raises ValueError for any other content."""
    data = gzip.decompress(path.read_bytes())
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: starts with {data[:3]!r}, but an IDX file of bytes starts with b'\\x00\\x00\\x08'")
    dimensions = data[3]
    shape = tuple(np.frombuffer(data, ">u4", dimensions, offset=4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if values.size != np.prod(shape):
        raise ValueError(f"{path}: contains {values.size} values, but its header declares {shape}")
    return values.reshape(shape)


def _write_images(folder: Path, images: Pixels, labels: Pixels, samples: int | None) -> int:
    for name in FASHION_CLASSES:
        (folder / name).mkdir(parents=True)
    images, labels = images[:samples], labels[:samples]
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(pixels).save(folder / FASHION_CLASSES[label] / f"{number:05}.png")
    return len(images)


def write_solar_cells(source: Path, output: Path, options: WriteOptions) -> dict[str, int]:
    """Write SPLIT/PROBABILITY/FILE.png; each class of defect probability is split at random."""
    with (source / "data" / "labels.csv").open() as file:
        rows = [line.split() for line in file if line.strip()]
    classes: dict[str, list[str]] = {}
    for path, probability, _kind in rows:
        classes.setdefault(f"{100 * float(probability):03.0f}-percent", []).append(path)
    counts = {"train": 0, "select": 0, "test": 0}
    for name, paths in sorted(classes.items()):
        order = np.random.default_rng([options.seed, len(paths)]).permutation(len(paths))
        test, select = (round(len(paths) * share) for share in (TEST_SHARE, SELECT_SHARE))
        parts = {"test": order[:test], "select": order[test : test + select], "train": order[test + select :]}
        for split, chosen in parts.items():
            folder = output / split / name
            folder.mkdir(parents=True)
            kept = chosen if options.samples is None else chosen[: -(-options.samples // len(classes))]
            for number in kept:
                shutil.copyfile(source / "data" / paths[number], folder / Path(paths[number]).name)
            counts[split] += len(kept)
    return counts
