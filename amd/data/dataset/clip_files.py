"""Write generated clips: H.264 files, and a list file with their paths and labels.

Depends on PyAV only inside `encode_h264`.
Shapes: T frames, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Pixels: TypeAlias = npt.NDArray[np.uint8]

LIST = "list.txt"
NEAR_LOSSLESS = 8
CHUNK = 64  # maximum number of clips in memory


def write_clips(folder: Path, clips: Iterable[Pixels], labels: Sequence[int], *, rate: int = 8) -> None:
    """Write clips, (T, H, W) or (T, H, W, 3), to `folder/NNNNN.mp4`, and list.txt with lines of the form `path label`.

    `clips` may be an iterator; only a few clips are held in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:05}.mp4" for i in range(len(labels))]
    pending = zip(names, clips, strict=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:  # libx264 releases the GIL
        while some := list(islice(pending, CHUNK)):
            list(pool.map(lambda item: encode_h264(folder / item[0], item[1], rate), some))
    write_list(folder / LIST, names, labels)


def write_list(path: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """Write a list file with one `path label` line per clip, as in VideoMAE."""
    path.write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True)))


def encode_h264(path: Path, frames: Pixels, rate: int = 8, crf: int = NEAR_LOSSLESS) -> None:
    """Encode grey (T, H, W) or RGB (T, H, W, 3) frames as an H.264 mp4; the default quality preserves motion."""
    import av

    if frames.ndim == 3:
        planes, pixel_format = _grey_planes(frames), "yuv420p"
    else:
        planes, pixel_format = np.ascontiguousarray(frames), "rgb24"
    height, width = frames.shape[1:3]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=rate, options={"crf": str(crf), "preset": "veryfast", "bf": "0"}
        )
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        for picture in planes:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=pixel_format)))
        container.mux(stream.encode())


def _grey_planes(frames: Pixels) -> Pixels:
    """Return yuv420p planes in video range: luma rows, then half as many rows of neutral chroma."""
    count, height, width = frames.shape
    planes = np.full((count, height * 3 // 2, width), 128, np.uint8)
    planes[:, :height] = np.rint(16 + frames.astype(np.float32) * (219 / 255)).astype(np.uint8)
    return planes
