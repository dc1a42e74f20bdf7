"""One raw sample to one that trains fast: a smaller picture, few frames between key frames, nothing hard to decode.

Runs in the decoding process. The same source gives the same bytes (no threads, no times or versions of ours in
the file). Knows nothing of shards.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from amd.data.decoding.frames import Pixels, Source, VideoError
from amd.data.decoding.images import load_rgb
from amd.data.decoding.video import open_video

SCALING = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Transcoded(NamedTuple):
    content: bytes
    suffix: str
    facts: dict[str, Any]  # frames, width, height


def transcode(
    source: Source, kind: str, *, short_side: int, gop: int, crf: int, frame_rate: float | None, quality: int
) -> Transcoded:
    """A JPEG of an image, an mp4 (H.264, closed GOPs, fastdecode) of a video; never enlarged.

    `frame_rate` keeps the frame nearest to each tick. Raises ImageError or VideoError.
    """
    if kind == "image":
        return _image(source, short_side, quality)
    video = open_video(source)
    try:
        rate = _rate(source)
        keep = _ticks(video.frames, rate, frame_rate)
        written = Fraction(frame_rate).limit_denominator(1001) if frame_rate and frame_rate < rate else rate
        return _encode(video.each(keep), written, short_side, gop, crf)
    finally:
        video.close()


def _image(source: Source, short_side: int, quality: int) -> Transcoded:
    image = load_rgb(source)
    size = _smaller(image.height, image.width, short_side, 1)
    if size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Transcoded(out.getvalue(), ".jpg", {"frames": 1, "width": size[1], "height": size[0]})


def _smaller(height: int, width: int, short_side: int, multiple: int) -> tuple[int, int]:
    """Height and width with the short side at most `short_side`, both multiples (4:2:0 needs even sides)."""
    scale = min(1.0, short_side / min(height, width))

    def side(pixels: int) -> int:
        return max(multiple, round(pixels * scale / multiple) * multiple)

    return side(height), side(width)


def _rate(source: Source) -> Fraction:
    with av.open(str(source) if isinstance(source, Path) else io.BytesIO(source)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return Fraction(rate).limit_denominator(1001)


def _ticks(frames: int, rate: Fraction, wanted: float | None) -> list[int]:
    if not wanted or wanted >= rate:
        return list(range(frames))
    step = float(rate) / wanted
    return [min(frames - 1, int(n * step + 0.5)) for n in range(max(1, round(frames / step)))]


def _encode(frames: Iterator[Pixels], rate: Fraction, short_side: int, gop: int, crf: int) -> Transcoded:
    out, count = io.BytesIO(), 0
    height = width = 0
    stream: Any = None
    scaler = VideoReformatter()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        for pixels in frames:
            if stream is None:
                height, width = _smaller(pixels.shape[0], pixels.shape[1], short_side, 2)
                stream = container.add_stream("libx264", rate=rate)
                stream.height, stream.width, stream.pix_fmt, stream.gop_size = height, width, "yuv420p", gop
                stream.codec_context.thread_count = 1
                stream.options = {
                    "preset": "medium",
                    "tune": "fastdecode",
                    "crf": str(crf),
                    # No mbtree: what it finds in memory past a frame's edge changes bytes on CPUs with AVX-512.
                    "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:threads=1:mbtree=0",
                }
            whole = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            # Here rather than in the encoder, whose own conversion is neither exact nor in one thread.
            frame = scaler.reformat(whole, width, height, "yuv420p", interpolation=SCALING, threads=1)
            frame.pts, frame.time_base = count, 1 / rate
            container.mux(stream.encode(frame))
            count += 1
        if stream is None:
            raise VideoError("gave no frame")
        container.mux(stream.encode(None))
    return Transcoded(out.getvalue(), ".mp4", {"frames": count, "width": width, "height": height})
