"""Parse multi-label list files: `path 3,17` or, for frame folders, `path total_frames 3,17`.

`-` marks a sample without labels. Lines are parsed one at a time, because their label counts differ; lists for
multi-label data sets rarely exceed a few hundred thousand lines.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from amd.config import DataConfig
from amd.data.dataset.manifest import MAX_PROBLEMS, Manifest, ManifestError, Names, capped
from amd.data.dataset.open import manifest_errors, resolve_url, text_blocks
from amd.data.dataset.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from amd.storage import filesystem, is_remote, local_path

MAX_LABEL_DIGITS = 9


class LabelSets:
    """The labels of each record: `label_sets[i]` is an array of class indices."""

    def __init__(self, sets: list[tuple[int, ...]]) -> None:
        self.offsets = np.zeros(len(sets) + 1, np.int64)
        np.cumsum([len(labels) for labels in sets], out=self.offsets[1:])
        self.values = np.fromiter((label for labels in sets for label in labels), np.int64, int(self.offsets[-1]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def digest(self) -> str:
        return hashlib.sha256(self.offsets.astype("<i8").tobytes() + self.values.astype("<i8").tobytes()).hexdigest()

    def __getitem__(self, record: int) -> npt.NDArray[np.int64]:
        return self.values[self.offsets[record] : self.offsets[record + 1]]


def open_label_sets(data: DataConfig, url: str | None = None) -> tuple[Manifest, LabelSets]:
    """Open a multi-label list file. Raises ManifestError with file:line, the rule and how to fix it."""
    requested = data.train if url is None else url
    with manifest_errors(requested):
        real = resolve_url(requested)
        fs, path = filesystem(real)
        if fs.isdir(path):
            raise ManifestError([f"data.train: {requested} is a folder; multi-label data requires a list file"])
        lines = [(number, line.strip()) for number, line in enumerate(_lines(real), start=1) if line.strip()]
    if not lines:
        raise ManifestError([f"data.train: {requested} has no samples; each line must have the form `path 3,17`"])
    with_frames = data.format == "frame_list" or (data.format == "auto" and _counts_frames(lines[0][1]))
    names: list[bytes] = []
    frames: list[int] = []
    sets: list[tuple[int, ...]] = []
    problems: list[str] = []
    for number, line in lines:
        path, *numbers = line.rsplit(maxsplit=1 + with_frames)
        labels = _labels(numbers[-1]) if len(numbers) == 1 + with_frames else None
        if labels is None or (with_frames and not numbers[0].isdecimal()):
            form = "path total_frames 3,17" if with_frames else "path 3,17"
            problems.append(f"{real}:{number}: {line!r}: write `{form}`, with - for no labels")
            continue
        names.append(path.encode("utf-8", "surrogateescape"))
        frames.append(int(numbers[0]) if with_frames else 0)
        sets.append(labels)
    if problems:
        raise ManifestError(capped(problems[:MAX_PROBLEMS], len(problems)))
    root = data.root or posixpath.dirname(real)
    root = root.rstrip("/") if is_remote(root) else str(local_path(root))
    first = np.array([labels[0] if labels else -1 for labels in sets], np.int64)
    counts = np.array(frames, np.int32) if with_frames else None
    return Manifest(Names.of(names), first, root=root, frames=counts), LabelSets(sets)


def _labels(text: str) -> tuple[int, ...] | None:
    if text == "-":
        return ()
    parts = text.split(",")
    valid = all(part.isdecimal() and len(part) <= MAX_LABEL_DIGITS for part in parts)
    return tuple(sorted({int(part) for part in parts})) if valid else None


def _counts_frames(line: str) -> bool:
    """Return whether a line is from a frame list: a folder, its frame count, and labels."""
    path, *numbers = line.rsplit(maxsplit=2)
    is_file = path.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    return len(numbers) == 2 and numbers[0].isdecimal() and not is_file


def _lines(url: str) -> Iterator[str]:
    rest = ""
    for block in text_blocks(url):
        whole = (rest + block.decode("utf-8", "surrogateescape")).split("\n")
        rest = whole.pop()
        yield from whole
    if rest:
        yield rest
