"""Decode streams with decord where it is exact; an alternative decoder (data.decoder=decord) for comparison.

Compared with PyAV's exact decoding, decord 0.6 silently returns wrong frames for open GOPs, edit lists, intra refresh,
HEVC from x265, MPEG transport and program streams, H.264 in AVI, interlaced video and 10-bit video, and does not
report damaged frames. It is also slower than video.py. Only progressive 8-bit H.264 in mp4 with closed key frames is
passed to decord. PyAV is used instead if decord fails, if its frame count differs from the number of packets, or if it
returns the same frame twice, as it does for frames that it cannot decode; other damage is not detected.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from amd.data.decoding.damage import Damage
from amd.data.decoding.frames import Allocate, Pixels, Source, new_pixels
from amd.data.decoding.packets import PacketMap
from amd.data.decoding.sequential import check_indices
from amd.data.decoding.video import MappedVideo


def decord_supports(container: Any, stream: Any, map_: PacketMap) -> bool:
    """Return whether decord decodes this stream exactly (see the module docstring)."""
    context = stream.codec_context
    first = next(iter(container.decode(stream)), None) if _rewind(container) else None
    return (
        "mp4" in container.format.name.split(",")
        and context.name == "h264"
        and context.pix_fmt == "yuv420p"
        and map_.closed
        and not map_.edited
        and first is not None
        and not first.interlaced_frame
        and not any(data.type.name == "DISPLAYMATRIX" for data in first.side_data)
    )


def _rewind(container: Any) -> bool:
    container.seek(0)
    return True


class DecordVideo:
    """A video read by decord until decord fails, and by `exact` from then on."""

    def __init__(self, source: Source, exact: MappedVideo) -> None:
        import decord

        self._errors = (RuntimeError, decord.DECORDError)
        self._exact = exact
        self.decoder = "pyav"
        opened = str(source) if isinstance(source, Path) else io.BytesIO(source)
        try:
            self._reader = decord.VideoReader(opened, num_threads=1)
        except self._errors:
            self._reader = None
        else:
            if len(self._reader) == exact.frames:
                self.decoder = "decord"

    @property
    def frames(self) -> int:
        return self._exact.frames

    @property
    def damage(self) -> Damage | None:
        return self._exact.damage

    @property
    def numbers(self) -> Sequence[int]:
        return self._exact.numbers

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        check_indices(indices, self.frames)
        frames = self._batch(indices) if self.decoder == "decord" else None
        if frames is None:
            self.decoder = "pyav"
            return self._exact.read(indices, allocate)
        output = allocate(frames.shape)
        output[...] = frames
        return output

    def _batch(self, indices: Sequence[int]) -> Pixels | None:
        """Return frames, or None if decord cannot read them."""
        try:
            frames: Pixels = self._reader.get_batch(list(indices)).asnumpy()
        except self._errors:
            return None
        if len(frames) != len(indices):
            return None
        rows = dict(zip(indices, frames, strict=True))
        ordered = [rows[n] for n in sorted(rows)]
        repeats = any(np.array_equal(one, other) for one, other in pairwise(ordered))
        return None if repeats else frames

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        for n in indices:
            yield self.read([n])[0]

    def exclude_damaged(self) -> None:
        self._exact.exclude_damaged()

    def close(self) -> None:
        self._reader = None
        self._exact.close()
