"""Convert decoded video frames to upright RGB pixels in one array. Accesses neither files nor packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

Source = Path | bytes  # a local file, or a whole file's bytes
Pixels = npt.NDArray[np.uint8]
Allocate = Callable[[tuple[int, ...]], Pixels]


class VideoError(Exception):
    """Raised for a video that cannot be decoded correctly, with a one-sentence reason."""


class DamagedFrames(VideoError):
    """Raised when requested frames do not decode, although other frames of the video may."""


def new_pixels(shape: tuple[int, ...]) -> Pixels:
    return np.empty(shape, np.uint8)


class ToRGB:
    """Converts decoded frames to upright RGB, (H, W, 3). The result is a view, valid only until the next frame."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()  # reused: creating one per frame takes a fifth of the time per clip

    def __call__(self, frame: Any) -> Pixels:
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)  # the default uses every core
        plane = rgb.planes[0]
        lines = np.frombuffer(memoryview(plane), np.uint8)[: plane.line_size * rgb.height].reshape(
            rgb.height, plane.line_size
        )
        return _upright(frame, lines[:, : rgb.width * 3].reshape(rgb.height, rgb.width, 3))


class FrameBuffer:
    """Collects frames in one array, allocated when the first frame determines the size."""

    def __init__(self, indices: Sequence[int], allocate: Allocate) -> None:
        self._rows: dict[int, list[int]] = {}
        for row, number in enumerate(indices):
            self._rows.setdefault(int(number), []).append(row)
        self._put: set[int] = set()
        self._count, self._allocate = len(indices), allocate
        self._pixels: Pixels | None = None
        self._to_rgb = ToRGB()

    def is_missing(self, number: int) -> bool:
        return number not in self._put

    def put(self, number: int, frame: Any) -> None:
        rgb = self._to_rgb(frame)
        if self._pixels is None:
            self._pixels = self._allocate((self._count, *rgb.shape))
        if self._pixels.shape[1:] != rgb.shape:
            raise VideoError(f"changes resolution at frame {number}")
        for row in self._rows[number]:
            self._pixels[row] = rgb
        self._put.add(number)

    def result(self) -> Pixels:
        if self._pixels is None:
            raise VideoError("has no frame that can be decoded")
        return self._pixels


def _upright(frame: Any, pixels: Pixels) -> Pixels:
    """Apply the display matrix (ISO/IEC 14496-12, 6.2.2).

    Raises VideoError unless it is a flip or a rotation by a multiple of 90 degrees.
    """
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    rotate = ROTATIONS.get((_sign(a), _sign(b), _sign(c), _sign(d)))
    if rotate is None:
        raise VideoError("is rotated by an angle that is not a multiple of 90 degrees")
    return rotate(pixels)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


ROTATIONS: dict[tuple[int, int, int, int], Callable[[Pixels], Pixels]] = {
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, 3),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: np.rot90(p, 2).transpose(1, 0, 2),
}
