"""Limits on untrusted files, as plain values that can be sent to the decoding process. Imports no decoder."""

from __future__ import annotations

from typing import NamedTuple


class VideoLimits(NamedTuple):
    """Maximum size of a video; larger videos are rejected before decoding."""

    pixels: int
    """Pixels per frame."""
    frames: int
    """Number of frames."""
    duration_s: float
    """Duration in seconds, according to the header."""


class FileLimits(NamedTuple):
    """Maximum size of an image or a video. Limits on values in the file's header are checked before decoding."""

    bytes: int
    """Size of the file, in bytes."""
    pixels: int
    """Pixels in an image or a video frame."""
    frames: int
    """Number of frames in a video."""
    duration_s: float
    """Duration of a video, in seconds."""
    decoded_bytes: int
    """Total size of the requested frames as RGB, in bytes."""

    @property
    def video_limits(self) -> VideoLimits:
        return VideoLimits(self.pixels, self.frames, self.duration_s)
