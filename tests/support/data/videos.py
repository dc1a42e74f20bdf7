"""Write video files for tests with PyAV: ordinary files, and files that are hard to decode correctly.

Frames show drifting smooth noise and a bar that grows with the frame number, so that any two frames differ clearly.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parents[2] / "golden"


def pictures(count: int, width: int = 96, height: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Return `count` clearly different uint8 frames of shape (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    frames = []
    for n in range(count):
        frame = texture[n % height : n % height + height, (2 * n) % width : (2 * n) % width + width].copy()
        frame[: height // 4, : 1 + (n * 7) % width] = 255 - frame[: height // 4, : 1 + (n * 7) % width]
        frames.append(frame)
    return frames


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    fps: int = 30,
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    audio: bool = False,
    container: dict[str, str] | None = None,
    container_format: str | None = None,
) -> Path:
    """Encode frames to `path`. For a variable frame rate, `times` are presentation timestamps in 1/600 s."""
    with av.open(str(path), "w", options=container or {}, format=container_format) as out:
        stream: Any = out.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        stream.options = (
            {"preset": "veryfast", **(options or {})} if "264" in codec or "265" in codec else options or {}
        )
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        sound: Any = out.add_stream("aac", rate=16000) if audio else None
        for n, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts = times[n] if times is not None else n
            frame.time_base = Fraction(1, 600) if times is not None else Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            _write_silence(out, sound, len(frames) / fps)
    return path


def copy_av1(path: Path) -> Path:
    """Copy an AV1 file of `pictures(50)`, written by `write_video` with codec="libsvtav1" and options={"preset": "12"}.

    Not encoded in tests: run as root, SVT-AV1 permanently gives the calling thread real-time priority (SCHED_FIFO 99),
    and its threads once deadlocked (version 4.1.0).
    """
    shutil.copyfile(GOLDEN / "av1.mp4", path)
    return path


def write_audio_only(path: Path, seconds: float = 1.0) -> Path:
    with av.open(str(path), "w") as out:
        _write_silence(out, out.add_stream("aac", rate=16000), seconds)
    return path


def _write_silence(out: Any, stream: Any, seconds: float) -> None:
    for start in range(0, int(seconds * 16000) - 1024, 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def exact_frames(path: Path | str) -> np.ndarray:
    """Return reference frames (N, H, W, 3), decoded in order from the first packet to the last."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def patch_box(path: Path, name: bytes, change: Callable[[bytearray, int], None]) -> Path:
    """Edit the first mp4 box with this name in place. `change` receives the file's bytes and the content's offset."""
    data = bytearray(path.read_bytes())
    at = data.find(name)
    if at < 0:
        raise ValueError(f"{path} has no {name!r} box")
    change(data, at + 4)
    path.write_bytes(data)
    return path


def set_edit(path: Path, *, skip_frames: int, show_frames: int, fps: int = 30) -> Path:
    """Set the file's edit list to skip the first `skip_frames` frames and present the next `show_frames`."""
    data = path.read_bytes()
    at = data.find(b"mvhd") + 4
    movie_scale = struct.unpack(">I", data[at + 12 : at + 16])[0]
    at = data.find(b"mdhd") + 4
    media_scale = struct.unpack(">I", data[at + 12 : at + 16])[0]

    def change(box: bytearray, start: int) -> None:
        old_time = struct.unpack(">i", box[start + 12 : start + 16])[0]
        duration, skipped = show_frames * movie_scale // fps, skip_frames * media_scale // fps
        box[start + 8 : start + 16] = struct.pack(">Ii", duration, old_time + skipped)

    return patch_box(path, b"elst", change)


def set_rotation(path: Path, degrees: int) -> Path:
    """Write a display matrix that rotates the picture clockwise by 45, 90, 180 or 270 degrees."""
    turns = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0), 45: (1, 1, -1, 1)}
    a, b, c, d = turns[degrees]

    def change(box: bytearray, start: int) -> None:
        one = 0x10000
        matrix = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 0x40000000)
        box[start + 40 : start + 76] = struct.pack(">9i", *matrix)

    return patch_box(path, b"tkhd", change)


def cut_copy(path: Path, out: Path) -> Path:
    """Copy the packets from the second key frame onwards, like `ffmpeg -ss … -c copy`. Timestamps start at 0."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        copy: Any = target.add_stream_from_template(stream)
        start: int | None = None
        for number, packet in enumerate(source.demux(stream)):
            if start is None and number and packet.is_keyframe:
                start = packet.dts
            if start is not None and packet.size and packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copy
                target.mux(packet)
    return out
