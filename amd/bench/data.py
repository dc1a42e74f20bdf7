"""Benchmark data loading: read, decode and augmentation times, and the number of loader workers that a
training run needs.

Our reader and plain decord read the same frames of each file back to back, in alternating order: on a shared machine,
only timings taken back to back are comparable. Everything runs on one core, so rates are per core. Without data, the
benchmark writes and measures 10 s videos of 340x256 H.264 with frequent (GOP 12) and rare (GOP 250) key frames. Does
not import Ray. av and Pillow, which `bench step` does not need, are imported where they are used.
"""

from __future__ import annotations

import io
import math
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from amd.bench.tables import REPEATS
from amd.config import ClipConfig, DataConfig
from amd.data.dataset.manifest import Manifest
from amd.data.dataset.open import open_manifest
from amd.data.dataset.record import FrameChooser, Record
from amd.data.decoding.reader import BadSample, SampleReader
from amd.data.faults import DataFault
from amd.data.loading import frame_sampling, transforms
from amd.data.loading.loader import ClipLoader
from amd.storage import filesystem, is_remote, local_path

GOPS = (12, 250)
WARM_UP = 2  # samples read before measuring, to start the reader and fill caches


T = TypeVar("T")


class SampleTimings(NamedTuple):
    """Timings of one sample, in milliseconds."""

    read: float  # fetch the bytes, without decoding
    whole: float  # fetch and decode with our reader
    decord: float | None  # decode with bare decord; None if it fails
    augment: float  # one clip
    collate: float  # one clip into its batch
    official: float  # augment and normalise one clip as the official code does

    def speed_against_official(self, repeats: int) -> float | None:
        """Return the speed-up over the official code, which decodes with decord, for a sample with `repeats` clips."""
        if self.decord is None:
            return None
        return (self.decord + repeats * self.official) / (self.whole + repeats * (self.augment + self.collate))


def bench_data(
    data: DataConfig | None = None,
    clip: ClipConfig | None = None,
    *,
    samples: int = 40,
    target: float | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the loading of `samples` samples from `data`, which defaults to synthetic videos.

    `clip` defaults to 16 frames of 224x224.
    `target`: clips per second that a training worker consumes; if given, the result recommends data.loader_workers.
    Times are medians in milliseconds: read, decode and decord per sample, augment and collate per clip.
    Rates are clips per second of CPU time on one core, measured with the loader used in training.
    """
    clip = clip or ClipConfig()
    with _one_thread(), tempfile.TemporaryDirectory(prefix="amd-bench-") as folder:
        sets = {data.train: data} if data is not None else _synthetic(Path(folder), log)
        found = [_bench(name, one, clip, samples, log) for name, one in sets.items()]
    for one in found:
        rate = one["clips_per_s"]
        one["loader_workers"] = recommend_workers(target, rate) if target is not None and rate else None
    return {"frames": clip.frames, "size": list(clip.size), "target_clips_per_s": target, "sets": found}


def recommend_workers(target: float, rate: float) -> int:
    """Return the number of loader workers for `target` clips per second at `rate` per core, with 25 % headroom."""
    return max(1, math.ceil(1.25 * target / rate))


def write_videos(folder: Path, gop: int, count: int = 2, seconds: int = 10, size: tuple[int, int] = (256, 340)) -> None:
    """Write H.264 videos (30 frames/s, x264 medium, crf 26, about 0.7 Mb/s) of a noisy, drifting texture."""
    import av

    folder.mkdir(parents=True, exist_ok=True)
    height, width = size
    y, x = np.mgrid[:height, :width]
    for number in range(count):
        rng = np.random.default_rng(number)
        texture = (
            rng.integers(40, 216, (height // 4, width // 4, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        )
        with av.open(str(folder / f"clip{number}.mp4"), "w") as container:
            options = {"preset": "medium", "crf": "26", "g": str(gop)}
            stream: Any = container.add_stream("libx264", rate=30, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for t in range(30 * seconds):
                rows = (y + t / 2 + 4 * np.sin(x / 30 + t / 9)).astype(np.int64) % len(texture)
                columns = (x + t + 4 * np.sin(y / 25 - t / 7)).astype(np.int64) % texture.shape[1]
                pixels = texture[rows, columns] + rng.integers(0, 8, (height, width, 1), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))


def _synthetic(folder: Path, log: Callable[[str], None]) -> dict[str, DataConfig]:
    sets = {}
    for gop in GOPS:
        name = f"340x256 H.264, GOP {gop}"
        log(f"writing {name}")
        write_videos(folder / str(gop), gop)
        sets[name] = DataConfig(train=str(folder / str(gop)), format="video_folder", repeats=REPEATS)
    return sets


def _bench(name: str, data: DataConfig, clip: ClipConfig, samples: int, log: Callable[[str], None]) -> dict[str, Any]:
    data = data.model_copy(update={"loader_workers": 0})
    manifest = open_manifest(data)
    log(f"reading {samples} samples of {name}")
    timings, bad = _timings(data, clip, manifest, samples)
    rates = {repeats: _rate(data, clip, manifest, samples, repeats) for repeats in {data.repeats, REPEATS}}
    return {
        "name": name,
        "samples": len(timings),
        "bad": bad,
        "repeats": data.repeats,
        "read_ms": _median([timing.read for timing in timings]),
        "decode_ms": _median([max(timing.whole - timing.read, 0.0) for timing in timings]),
        "decord_ms": _median([timing.decord for timing in timings if timing.decord is not None]),
        # Median of pairwise ratios: samples differ more from each other than the two readers do.
        "speed_against_decord": _median(
            [timing.decord / timing.whole for timing in timings if timing.decord is not None]
        ),
        f"speed_against_official_repeats_{REPEATS}": _median(
            [speed for timing in timings if (speed := timing.speed_against_official(REPEATS)) is not None]
        ),
        "official_augment_ms": _median([timing.official for timing in timings]),
        "augment_ms": _median([timing.augment for timing in timings]),
        "augment_share": _median([timing.augment / timing.whole for timing in timings]),
        "collate_ms": _median([timing.collate for timing in timings]),
        "clips_per_s": rates[data.repeats],
        f"clips_per_s_repeats_{REPEATS}": rates[REPEATS],
    }


def _timings(data: DataConfig, clip: ClipConfig, manifest: Manifest, samples: int) -> tuple[list[SampleTimings], int]:
    """Return the timings of readable samples, and the number of unreadable samples."""
    timings, bad, reader = [], 0, SampleReader(data)
    out = torch.empty((clip.frames, *clip.size, 3), dtype=torch.uint8)
    picks = random.Random(0)
    try:
        for index in range(samples + WARM_UP):
            record = manifest[picks.randrange(len(manifest))]
            try:
                timing = _time_sample(reader, record, data, clip, index, out)
            except BadSample:
                bad += 1
                continue
            if index >= WARM_UP:
                timings.append(timing)
    finally:
        reader.close()
    return timings, bad


def _time_sample(
    reader: SampleReader, record: Record, data: DataConfig, clip: ClipConfig, index: int, out: torch.Tensor
) -> SampleTimings:
    def choose(total: int) -> frame_sampling.Indices:
        return frame_sampling.training_chooser(data, clip, random.Random(index))(
            total
        )  # the same frames for both readers

    read, fetched = _timed(lambda: _fetch(record))
    if index % 2:
        whole, frames = _timed(lambda: reader.read_clip(record, choose))
        bare, by_decord = _timed(lambda: _decord(record, fetched, choose))
    else:
        bare, by_decord = _timed(lambda: _decord(record, fetched, choose))
        whole, frames = _timed(lambda: reader.read_clip(record, choose))
    draws = random.Random(index)
    augment, cut = _timed(lambda: transforms.augment(torch.from_numpy(frames), data, clip, draws))
    collate, _ = _timed(lambda: out.copy_(cut))
    official, _ = _timed(lambda: _official_clip(frames, clip, random.Random(index)))
    return SampleTimings(read, whole, None if by_decord is None else bare, augment, collate, official)


def _fetch(record: Record) -> bytes:
    """Return the bytes of a sample, or empty bytes for a frame folder, which consists of many files."""
    if record.kind == "frames":
        return b""
    fs, path = filesystem(record.location)
    if record.offset is None or record.size is None:
        return bytes(fs.cat_file(path))
    return bytes(fs.cat_file(path, start=record.offset, end=record.offset + record.size))


def _decord(record: Record, fetched: bytes, choose: FrameChooser) -> npt.NDArray[np.uint8] | None:
    """Decode a video using only decord. Return None if the record is not a video, or decord fails or is missing."""
    if record.kind != "video" or find_spec("decord") is None:
        return None
    import decord

    source = io.BytesIO(fetched) if is_remote(record.location) or record.member else str(local_path(record.location))
    try:
        reader = decord.VideoReader(source, num_threads=1)
        pixels: npt.NDArray[np.uint8] = reader.get_batch(choose(len(reader))).asnumpy()
        return pixels
    except (RuntimeError, decord.DECORDError):
        return None


def _official_clip(frames: npt.NDArray[np.uint8], clip: ClipConfig, draws: random.Random) -> torch.Tensor:
    """Augment as in AMD's dataset/transforms.py: crop and resize PIL images one by one, normalise in float32."""
    from PIL import Image

    height, width = clip.size
    box = transforms.multi_scale_box((frames.shape[1], frames.shape[2]), clip.size, draws)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    images = [
        Image.fromarray(frame).crop(corners).resize((width, height), Image.Resampling.BILINEAR) for frame in frames
    ]
    stacked = torch.from_numpy(np.concatenate([np.asarray(image) for image in images], axis=2))  # (H, W, T x 3)
    pixels = stacked.permute(2, 0, 1).contiguous().float().div(255)
    for plane, mean, std in zip(pixels, clip.mean * len(frames), clip.std * len(frames), strict=True):
        plane.sub_(mean).div_(std)
    return pixels.view(len(frames), 3, height, width).transpose(0, 1)


def _rate(data: DataConfig, clip: ClipConfig, manifest: Manifest, samples: int, repeats: int) -> float | None:
    """Measure the training loader, with its decoding process, in clips per second of CPU time.

    CPU time is used because wall time depends on other load on the machine. Returns None if no sample is readable.
    """
    data = data.model_copy(update={"repeats": repeats})
    batch_size = min(4, len(manifest))
    with ClipLoader(data, clip, manifest, batch_size=batch_size) as loader:
        try:
            next(loader.steps(0, 1))  # starts the decoding process
            start = _core_seconds()
            steps = loader.steps(1, 1 + -(-samples // batch_size))
            clips = sum(len(batch.clips) for step in steps for batch in step)
            return round(clips / (_core_seconds() - start), 2)
        except DataFault:
            return None


def _core_seconds() -> float:
    """Return the CPU seconds used by this process and its children; running children count only if /proc exists."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + children.ru_utime + children.ru_stime
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()  # from the third on: state, parent, ...
            if int(fields[1]) == os.getpid():
                seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Run `work` and return its duration in milliseconds and its result."""
    start = time.perf_counter()
    value = work()
    return (time.perf_counter() - start) * 1000, value


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 4) if values else None


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
