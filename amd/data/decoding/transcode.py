"""Transcode one raw sample for fast reading, with smaller frames, short GOPs and settings for fast decoding.

Runs in the decoding process. Deterministic: the same source always produces the same bytes, because no threads are used
and no timestamps or versions are written.
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

from amd.data.decoding.damage import Damage
from amd.data.decoding.frames import DamagedFrames, Pixels, Source, VideoError
from amd.data.decoding.images import load_rgb
from amd.data.decoding.video import open_video

SCALING = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Transcoded(NamedTuple):
    content: bytes
    suffix: str
    facts: dict[str, Any]  # frames, width, height; for videos, also the number of segments
    damage: Damage | None = None  # set for a partially decoded video


def transcode(
    source: Source,
    kind: str,
    *,
    short_side: int,
    gop: int,
    crf: int,
    frame_rate: float | None,
    quality: int,
    segment_s: float | None = None,
    segment: int = 0,
    min_decoded_share: float | None = None,
) -> Transcoded:
    """Transcode an image to JPEG, or a video to mp4 (H.264, closed GOPs, fastdecode); frames are never enlarged.

    `frame_rate`: frames per second; the frame nearest to each tick is kept. `segment_s`: approximate duration of a
    segment in seconds; only segment number `segment` is transcoded. `min_decoded_share`: minimum share of a damaged
    video's frames that must decode; None rejects damaged videos.
    Raises ImageError or VideoError if the source cannot be decoded.
    """
    if kind == "image":
        return _image(source, short_side, quality)
    video = open_video(source, min_decoded_share=min_decoded_share)
    try:
        rate = _rate(source)
        output_rate = Fraction(frame_rate).limit_denominator(1001) if frame_rate and frame_rate < rate else rate

        def encode() -> Transcoded:
            segments = _segments(_kept_frames(video.frames, rate, frame_rate), output_rate, segment_s)
            indices = segments[min(segment, len(segments) - 1)]  # damage may leave fewer segments than announced
            encoded = _encode(video.iter_frames(indices), output_rate, short_side, gop, crf)
            return encoded._replace(facts={**encoded.facts, "segments": len(segments)})

        try:
            encoded = encode()
        except DamagedFrames:
            if min_decoded_share is None:
                raise
            video.exclude_damaged()
            encoded = encode()
        return encoded._replace(damage=video.damage)
    finally:
        video.close()


def _image(source: Source, short_side: int, quality: int) -> Transcoded:
    image = load_rgb(source)
    size = _output_size(image.height, image.width, short_side, 1)
    if size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Transcoded(out.getvalue(), ".jpg", {"frames": 1, "width": size[1], "height": size[0]})


def _output_size(height: int, width: int, short_side: int, multiple: int) -> tuple[int, int]:
    """Return the height and width, with a short side of at most `short_side`, divisible by `multiple` (2 for 4:2:0)."""
    scale = min(1.0, short_side / min(height, width))

    def side(pixels: int) -> int:
        return max(multiple, round(pixels * scale / multiple) * multiple)

    return side(height), side(width)


def _rate(source: Source) -> Fraction:
    with av.open(str(source) if isinstance(source, Path) else io.BytesIO(source)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return Fraction(rate).limit_denominator(1001)


def _kept_frames(frames: int, rate: Fraction, target: float | None) -> list[int]:
    if not target or target >= rate:
        return list(range(frames))
    step = float(rate) / target
    return [min(frames - 1, int(n * step + 0.5)) for n in range(max(1, round(frames / step)))]


def _segments(frames: list[int], rate: Fraction, seconds: float | None) -> list[list[int]]:
    """Split frames into segments of equal length; a remainder shorter than half a segment joins the last segment."""
    if seconds is None:
        return [frames]
    length = max(1, round(seconds * rate))
    count = max(1, round(len(frames) / length))
    return [frames[n * length : (n + 1) * length if n < count - 1 else None] for n in range(count)]


def _encode(frames: Iterator[Pixels], rate: Fraction, short_side: int, gop: int, crf: int) -> Transcoded:
    out, count = io.BytesIO(), 0
    height = width = 0
    stream: Any = None
    scaler = VideoReformatter()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        for pixels in frames:
            if stream is None:
                height, width = _output_size(pixels.shape[0], pixels.shape[1], short_side, 2)
                stream = container.add_stream("libx264", rate=rate)
                stream.height, stream.width, stream.pix_fmt, stream.gop_size = height, width, "yuv420p", gop
                stream.codec_context.thread_count = 1
                stream.options = {
                    "preset": "medium",
                    "tune": "fastdecode",
                    "crf": str(crf),
                    # No mbtree: with AVX-512 it reads memory past the frame, which changes the output.
                    "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:threads=1:mbtree=0",
                }
            source_frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            # Convert here: the encoder's own conversion is neither exact nor single-threaded.
            frame = scaler.reformat(source_frame, width, height, "yuv420p", interpolation=SCALING, threads=1)
            frame.pts, frame.time_base = count, 1 / rate
            container.mux(stream.encode(frame))
            count += 1
        if stream is None:
            raise VideoError("has no frame that can be decoded")
        container.mux(stream.encode(None))
    return Transcoded(out.getvalue(), ".mp4", {"frames": count, "width": width, "height": height})
