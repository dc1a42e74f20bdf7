"""Decoded video frames to pixels: upright RGB, gathered in one array. Knows nothing of files or packets."""

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
    """A video that cannot be read, or not rightly; one sentence."""


def pixels(shape: tuple[int, ...]) -> Pixels:
    return np.empty(shape, np.uint8)


class ToRGB:
    """Decoded frames to upright RGB, (H, W, 3). A view: valid until the next frame."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()  # shared: PyAV makes one a frame otherwise, a fifth of a clip's time

    def __call__(self, frame: Any) -> Pixels:
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)  # the default takes every core
        plane = rgb.planes[0]
        lines = np.frombuffer(memoryview(plane), np.uint8)[: plane.line_size * rgb.height].reshape(
            rgb.height, plane.line_size
        )
        return _upright(frame, lines[:, : rgb.width * 3].reshape(rgb.height, rgb.width, 3))


class Output:
    """Where frames go: one array, allocated when the first frame tells its size."""

    def __init__(self, indices: Sequence[int], allocate: Allocate) -> None:
        self._rows: dict[int, list[int]] = {}
        for row, number in enumerate(indices):
            self._rows.setdefault(int(number), []).append(row)
        self._put: set[int] = set()
        self._count, self._allocate = len(indices), allocate
        self._pixels: Pixels | None = None
        self._to_rgb = ToRGB()

    def lacks(self, number: int) -> bool:
        return number not in self._put

    def put(self, number: int, frame: Any) -> None:
        turned = self._to_rgb(frame)
        if self._pixels is None:
            self._pixels = self._allocate((self._count, *turned.shape))
        if self._pixels.shape[1:] != turned.shape:
            raise VideoError(f"changes its picture's size at frame {number}")
        for row in self._rows[number]:
            self._pixels[row] = turned
        self._put.add(number)

    def done(self) -> Pixels:
        if self._pixels is None:
            raise VideoError("gave no frame")
        return self._pixels


def _upright(frame: Any, pixels: Pixels) -> Pixels:
    """Apply the display matrix (ISO/IEC 14496-12, 6.2.2): quarter turns and mirrors; others are refused."""
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    turn = TURNS.get((_sign(a), _sign(b), _sign(c), _sign(d)))
    if turn is None:
        raise VideoError("is shown at an angle that is no quarter turn")
    return turn(pixels)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


TURNS: dict[tuple[int, int, int, int], Callable[[Pixels], Pixels]] = {
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, 3),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: np.rot90(p, 2).transpose(1, 0, 2),
}
