"""One sample of a data set, as plain values: cheap to import, for the process that decodes. Reads nothing."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["image", "video", "frames"]

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
    ".ts",
    ".m2ts",
    ".wmv",
    ".flv",
    ".3gp",
)


def kind_of(name: str) -> Kind:
    """By the ending; what has no image's ending is tried as a video."""
    return "image" if name.lower().endswith(IMAGE_SUFFIXES) else "video"


class Record(NamedTuple):
    """One sample: where it is and how to open it."""

    location: str
    """URL or path of the file, the frame folder, or the tar shard."""
    label: int | None
    kind: Kind
    frames: int | None = None
    """Frames in a frame folder."""
    member: str | None = None
    """Name inside a tar shard, with its place in bytes."""
    offset: int | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        """For people and logs: the file, or shard.tar::member."""
        return f"{self.location}::{self.member}" if self.member else self.location


class BadSample(Exception):
    """A record that cannot be read, and the reason in one sentence."""

    def __init__(self, record: Record, reason: str) -> None:
        super().__init__(record, reason)  # plain arguments: it may cross processes
        self.record, self.reason = record, reason

    def __str__(self) -> str:
        return f"{self.record.name} {self.reason}"
