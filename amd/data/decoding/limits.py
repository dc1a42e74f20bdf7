"""What a file from a stranger may cost to decode. Plain values: they go to the decoding process as they are."""

from __future__ import annotations

from typing import NamedTuple

from amd.data.decoding.video import VideoLimits


class FileLimits(NamedTuple):
    """The most that an image or a video may have; more is refused before it is decoded, where its header tells."""

    bytes: int
    """Of the file."""
    pixels: int
    """Of an image, or of a video's frame."""
    frames: int
    """Of a video."""
    duration_s: float
    """Of a video."""
    decoded_bytes: int
    """Of all frames that are asked for, as RGB."""

    @property
    def of_video(self) -> VideoLimits:
        return VideoLimits(self.pixels, self.frames, self.duration_s)
