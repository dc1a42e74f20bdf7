"""Compare reading from storage that takes 50 ms per request with reading local files, using the same readers.

Run as `python -m tests.benchmarks.storage_latency [--store stub|s3] [--workers N] [--turns N] [--steps N]`. Writes
340x256 videos, photographs, frame folders and a tar of photographs, and reads them through ClipLoader in turn: locally,
from a store that serves the same files and waits before each response, and from that store without reading ahead. The
store is a stub in the decoding process, whose requests cost no CPU time, or a server with S3's protocol, which competes
for the CPUs. Prints one line of JSON per kind of data, with the medians over the turns: local samples per second, and
the rates of the other two relative to it.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from amd.bench.data import write_videos
from amd.config import ClipConfig, DataConfig
from amd.data.dataset.open import open_manifest
from amd.data.dataset.shards import ShardWriter, write_index
from amd.data.decoding.reader import SampleReader
from amd.data.loading.loader import ClipLoader
from tests.support.data import remote_folder
from tests.support.data.remote_decoder import RemoteReader
from tests.support.servers.slow_s3 import slow_s3

LATENCY_S = 0.05
SAMPLES, BATCH = 256, 8  # more samples than are read ahead, as in any real data set
FRAMES = 64  # per frame folder
VIDEO, IMAGE = ClipConfig(), ClipConfig(frames=1, tubelet=1)


def write_clips(folder: Path) -> Path:
    """Write two videos, and symlinks to them under other names."""
    write_videos(folder, gop=12, count=2, seconds=4, size=(256, 340))
    for n in range(2, SAMPLES):
        (folder / f"clip{n}.mp4").symlink_to(folder / f"clip{n % 2}.mp4")
    return folder


def write_photographs(folder: Path) -> Path:
    folder.mkdir()
    for n in range(SAMPLES):
        (folder / f"{n:03d}.jpg").write_bytes(_photograph(n, (500, 375)))
    return folder


def write_frame_folders(folder: Path) -> Path:
    """Write a folder of frames, symlinks to it, and a list file with each folder as a video."""
    (folder / "0").mkdir(parents=True)
    for frame in range(FRAMES):
        (folder / "0" / f"img_{frame + 1:05}.jpg").write_bytes(_photograph(frame, (340, 256)))
    for n in range(1, SAMPLES):
        (folder / str(n)).symlink_to(folder / "0")
    path = folder / "list.txt"
    path.write_text("".join(f"{n} {FRAMES} 0\n" for n in range(SAMPLES)))
    return path


def write_tar(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "000.tar"
    writer = ShardWriter()
    for n in range(SAMPLES):
        writer.add(f"{n:03d}", ".jpg", _photograph(n, (500, 375)), 0)
    content = writer.finish()
    path.write_bytes(content)
    write_index(str(path), len(content), writer.members)
    return path


def _photograph(seed: int, size: tuple[int, int]) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize(size).filter(ImageFilter.GaussianBlur(2)).save(out, "JPEG", quality=90)
    return out.getvalue()


KINDS: dict[str, tuple[Callable[[Path], Path], ClipConfig]] = {
    "videos": (write_clips, VIDEO),
    "images": (write_photographs, IMAGE),
    "frames": (write_frame_folders, VIDEO),
    "tar": (write_tar, IMAGE),
}


class LatencyStore(NamedTuple):
    """A store with latency that serves a local folder, and how to read it."""

    url: str
    """URL of the folder, with a slash at the end."""
    reader: type[SampleReader]


@contextmanager
def open_store(kind: str, folder: Path) -> Iterator[LatencyStore]:
    if kind == "stub":
        remote_folder.register()
        os.environ[remote_folder.LATENCY] = str(LATENCY_S)
        yield LatencyStore(f"remote://{folder}/", RemoteReader)
    else:
        with slow_s3(folder, LATENCY_S) as endpoint:
            os.environ |= {
                "AWS_ENDPOINT_URL_S3": endpoint,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
            }
            yield LatencyStore("s3://", SampleReader)


def measure(
    local: Path, remote: str, store: LatencyStore, clip: ClipConfig, options: argparse.Namespace
) -> dict[str, float]:
    """Read the data in three ways in turn. Return the local rate, and the ratios of the other two rates to it."""
    workers, steps = options.workers, options.steps
    ways = {"local": (str(local), 64), "ahead": (remote, 64), "not_ahead": (remote, 0)}
    with ExitStack() as stack:
        loaders: dict[str, ClipLoader] = {}
        for way, (location, mib) in ways.items():
            data = DataConfig(train=location, loader_workers=workers, read_ahead_mib=mib)
            loader = ClipLoader(data, clip, open_manifest(data), batch_size=BATCH, open_reader=store.reader)
            loaders[way] = stack.enter_context(loader)
            _rate(loader, range(workers * 2))  # starts the processes
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.turns):
            for way, loader in loaders.items():
                count = max(1, steps // 8) if way == "not_ahead" else steps  # it is slow
                rates[way].append(_rate(loader, range(turn * steps, turn * steps + count)))
    ratios = {
        way: statistics.median(b / a for a, b in zip(rates["local"], rates[way], strict=True)) for way in list(ways)[1:]
    }
    return {"local_samples_per_s": round(statistics.median(rates["local"]), 1)} | {
        way: round(ratio, 3) for way, ratio in ratios.items()
    }


def _rate(loader: ClipLoader, steps: range) -> float:
    started = time.perf_counter()
    samples = sum(len(batch.labels) for batch in itertools.chain(*loader.steps(steps.start, steps.stop)))
    return samples / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=96, help="number of steps per turn, each of 8 samples")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--store", choices=["stub", "s3"], default="stub")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        with open_store(options.store, folder) as store:
            for kind in options.kinds:
                write, clip = KINDS[kind]
                local = write(folder / kind)
                figures = measure(local, f"{store.url}{local.relative_to(folder)}", store, clip, options)
                print(json.dumps({"data": kind, **figures}), flush=True)


if __name__ == "__main__":
    main()
