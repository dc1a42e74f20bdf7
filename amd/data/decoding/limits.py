"""Limits on untrusted files. Plain values, since they are sent to the decoding process."""

from __future__ import annotations

from typing import NamedTuple

from amd.data.decoding.video import VideoLimits


class FileLimits(NamedTuple):
    """Maximum size of an image or a video; checked before decoding if the header contains the value."""

    bytes: int
    """Size of the file."""
    pixels: int
    """Pixels of an image or of a video frame."""
    frames: int
    """Frames of a video."""
    duration_s: float
    """Duration of a video."""
    decoded_bytes: int
    """Size of all requested frames as RGB."""

    @property
    def video_limits(self) -> VideoLimits:
        return VideoLimits(self.pixels, self.frames, self.duration_s)
