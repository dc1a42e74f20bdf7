"""Measure the CPU time for reading a clip (16 frames, every fourth, from a random start), compared with plain decord.

Run as `python tests/benchmarks/decoding.py [--clips 40]`. The columns, in ms per clip, are plain decord, our decoder in
this process, and the whole reader, including its child process and the transfer through shared memory. The CPU time of
both processes is counted, and readers alternate so that other load affects all columns equally. The image benchmark
compares with Pillow instead.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decord
import numpy as np
from PIL import Image

from amd.config import DataConfig
from amd.data.dataset.record import Record
from amd.data.decoding.images import read_image
from amd.data.decoding.reader import SampleReader
from amd.data.decoding.video import open_video
from tests.support.data.videos import write_video


def scene(count: int, width: int, height: int) -> list[np.ndarray]:
    """Return a panning textured image with grain and a swinging patch, about as complex as camera footage."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((width * 2, height * 2), Image.Resampling.BICUBIC)).astype(np.int16)
    frames = []
    for n in range(count):
        x, y = 3 * n % width, 2 * n % height
        frame = texture[y : y + height, x : x + width] // 2 + 64 + rng.integers(-6, 7, (height, width, 1))
        middle = int(width / 2 + width / 3 * np.sin(n / 11))
        frame[height // 3 : height // 3 + 60, middle - 30 : middle + 30] = texture[:60, :60]
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return frames


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=40)
    clips = parser.parse_args().clips
    frames = scene(300, 340, 256)
    with tempfile.TemporaryDirectory() as folder:
        for gop in (12, 250):
            path = Path(folder) / f"{gop}.mp4"
            write_video(path, frames, gop=gop, audio=True, options={"preset": "medium", "crf": "26"})
            print(json.dumps({"file": f"340x256, 10 s, GOP {gop}", **_video(path, clips)}))
        path = Path(folder) / "a.jpg"
        Image.fromarray(scene(1, 500, 376)[0]).save(path, quality=90)
        print(json.dumps({"file": "500x376 JPEG", **_image(path, clips)}))


def _video(path: Path, clips: int) -> dict[str, float]:
    reader, rng = SampleReader(DataConfig(train="x")), np.random.default_rng(0)
    readers: dict[str, Callable[[np.ndarray], Any]] = {
        "decord_ms": lambda i: decord.VideoReader(str(path), num_threads=1).get_batch(i).asnumpy(),
        "ours_ms": lambda i: open_video(path).read(i.tolist()),
        "reader_ms": lambda i: reader.read_clip(Record(str(path), None, "video"), lambda total: i),
    }
    return _times(readers, lambda: np.arange(16) * 4 + rng.integers(0, 236), clips, reader)


def _image(path: Path, turns: int) -> dict[str, float]:
    reader = SampleReader(DataConfig(train="x"))
    readers: dict[str, Callable[[np.ndarray], Any]] = {
        "pillow_ms": lambda _: read_image(path),
        "reader_ms": lambda i: reader.read_clip(Record(str(path), None, "image"), lambda total: i),
    }
    return _times(readers, lambda: np.array([0]), turns, reader)


def _times(
    readers: dict[str, Callable[[np.ndarray], Any]], draw: Callable[[], np.ndarray], turns: int, reader: SampleReader
) -> dict[str, float]:
    for read in readers.values():
        read(draw())
    child = reader._child.start().process.pid
    spent: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(turns):
        indices = draw()
        for name, read in readers.items():
            started = time.process_time() + _cpu(child)
            read(indices)
            spent[name].append(time.process_time() + _cpu(child) - started)
    reader.close()
    return {name: round(1e3 * float(np.mean(times)), 1) for name, times in spent.items()}


def _cpu(pid: int) -> float:
    """Return the CPU seconds of another process, read from schedstat because clock ticks are too coarse."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


if __name__ == "__main__":
    main()
