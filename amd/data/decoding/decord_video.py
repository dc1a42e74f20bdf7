"""Decode streams with decord where it is exact: an alternative decoder (data.decoder=decord) for comparison.

Compared with PyAV's exact decoding, decord 0.6 silently returns wrong frames for open GOPs, edit lists, intra refresh,
HEVC from x265, MPEG transport and program streams, H.264 in AVI, interlaced video and 10-bit video, and does not
report damaged frames. It is also slower than video.py. Only progressive 8-bit H.264 in mp4 with closed key frames is
passed to decord; damage inside such a stream goes undetected.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amd.data.decoding.frames import Allocate, Pixels, Source, VideoError, new_pixels
from amd.data.decoding.packets import PacketMap


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
    def __init__(self, source: Source, frames: int) -> None:
        import decord

        self._errors = (RuntimeError, decord.DECORDError)
        opened = str(source) if isinstance(source, Path) else io.BytesIO(source)
        try:
            self._reader = decord.VideoReader(opened, num_threads=1)
        except self._errors:
            raise VideoError("cannot be opened by decord") from None
        self.frames = frames
        if len(self._reader) != frames:
            raise VideoError(f"has {frames} frames, but decord counts {len(self._reader)}")

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        try:
            frames = self._reader.get_batch(list(indices)).asnumpy()
        except self._errors:
            raise VideoError(f"cannot be decoded by decord near frame {min(indices)}") from None
        output = allocate(frames.shape)
        output[...] = frames
        return output

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        for n in indices:
            yield self.read([n])[0]

    def close(self) -> None:
        self._reader = None
