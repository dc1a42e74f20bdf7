"""decord, for the streams that it reads rightly: kept as a choice (data.decoder=decord), for comparison.

Measured against PyAV's exact decoding, decord 0.6 silently returns wrong frames for open GOPs, edit lists, intra
refresh, HEVC as x265 writes it, MPEG transport and programme streams, H.264 in AVI, interlaced video and 10-bit video;
and damaged frames without a sign. It is also slower than video.py. So it is handed only progressive 8-bit H.264 in mp4
whose every key frame is closed; damage inside such a stream stays unseen.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amd.data.decoding.frames import Allocate, Pixels, Source, VideoError, pixels
from amd.data.decoding.packets import PacketMap


def reads_rightly(container: Any, stream: Any, map_: PacketMap) -> bool:
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
            raise VideoError(f"has {frames} frames, and {len(self._reader)} by decord's count")

    def read(self, indices: Sequence[int], allocate: Allocate = pixels) -> Pixels:
        try:
            read = self._reader.get_batch(list(indices)).asnumpy()
        except self._errors:
            raise VideoError(f"cannot be decoded by decord near frame {min(indices)}") from None
        output = allocate(read.shape)
        output[...] = read
        return output

    def each(self, indices: Sequence[int]) -> Iterator[Pixels]:
        for n in indices:
            yield self.read([n])[0]

    def close(self) -> None:
        self._reader = None
