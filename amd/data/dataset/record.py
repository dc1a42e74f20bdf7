"""Describe one sample of a data set with plain values. Performs no I/O; cheap to import in the decoding process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

FrameChooser = Callable[[int], npt.NDArray[np.int64]]  # frame count of a sample -> frames of one clip
SampleKind = Literal["image", "video", "frames"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".webm",
    ".mkv",
    ".avi",
    ".mpg",
    ".mpeg",
    ".m1v",
    ".vob",
    ".ts",
    ".mts",
    ".m2ts",
    ".wmv",
    ".asf",
    ".flv",
    ".f4v",
    ".3gp",
    ".3g2",
    ".ogv",
    ".rm",
)
VIDEO_PREFIX = "video:"  # in list files, precedes the name of a video that has an image suffix


def kind_of(name: str) -> SampleKind:
    """Return the kind implied by a file suffix; any file without an image suffix is treated as a video."""
    return "image" if name.lower().endswith(IMAGE_SUFFIXES) else "video"


class Record(NamedTuple):
    """The location of a sample, and the information needed to open it."""

    location: str
    """URL or path of the file, the frame folder, or the tar shard."""
    label: int | None
    kind: SampleKind
    frames: int | None = None
    """Number of frames in a frame folder."""
    member: str | None = None
    """Member name inside a tar shard."""
    offset: int | None = None
    """Byte offset of the member in its shard."""
    size: int | None = None
    """Size of the member in bytes."""

    @property
    def name(self) -> str:
        """Display name for messages and logs: the file, or `shard.tar::member`."""
        return f"{self.location}::{self.member}" if self.member else self.location


class BadSample(Exception):
    """Raised for a record that cannot be read, with a one-sentence reason."""

    def __init__(self, record: Record, reason: str) -> None:
        super().__init__(record, reason)  # plain arguments: it may be pickled across processes
        self.record, self.reason = record, reason

    def __str__(self) -> str:
        return f"{self.record.name} {self.reason}"
