"""Measure the throughput of a replica's engine under load, relative to the offline forward pass of the same encoder.

Run as `python tests/benchmarks/serving.py [--video] [--size S] [--concurrency 16] [--device cpu] [--json]`. Each
request has one item, and a client sends the next one as soon as it receives the response. Engine and offline turns
alternate.

The stage `forward` excludes decoding. Offline, clips in memory pass through `encode` in batches of the engine's token
budget. The engine receives PPM images of exactly the clip's size (repeated in every frame for a video encoder), which
are copied but neither decoded nor resized, so the difference is the overhead of the engine and its processes.
The stage `decoding` reads 500x376 JPEG files or 340x256 mp4 files. The offline pass uses as many decoding processes as
the engine, with read-ahead threads, and the same batches.

`ratio` is the median over turns of the engine's throughput divided by the offline throughput of the same turn, because
other load affects neighbouring turns equally. `cpu_ratio` compares items per CPU second of all processes, which other
load hardly affects. Use it with --threads 1, because threads that wait for each other spin. Latency is measured with
Poisson arrivals at half of the engine's throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import queue
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from amd.artifacts.weights import Card, encode, load_encoder, save_encoder
from amd.config import ClipConfig, DataConfig, EncoderConfig
from amd.data.decoding.reader import SampleReader
from amd.device import autocast, choose_device, use_threads
from amd.downstream.embedding.features import cut_clips, file_chooser
from amd.models.encoder import Encoder
from service.inference.engine import BATCH_TOKENS, Engine, EngineSettings, InferenceOptions, Item
from tests.benchmarks.decoding import scene
from tests.support.data.videos import write_video

DEADLINE_S = 600.0


class Offline:
    """Batched forward pass, as in a script that embeds a data set."""

    def __init__(self, url: str, settings: EngineSettings) -> None:
        self.device = choose_device(settings.device)
        encoder, self.card = load_encoder(url)
        self.encoder = encoder.requires_grad_(False).to(self.device)
        self.precision = "bf16" if settings.dtype == "bfloat16" else "fp32"
        budget = settings.max_batch_tokens or BATCH_TOKENS[self.device.type]
        self.batch = max(1, budget // encoder.grid.tokens)
        self.readers: queue.SimpleQueue[SampleReader] = queue.SimpleQueue()
        for _ in range(settings.decoders):
            self.readers.put(SampleReader(DataConfig(train="")))
        self.pool = ThreadPoolExecutor(settings.decoders, initializer=use_threads, initargs=(1,))

    @torch.inference_mode()
    def forward(self, clips: Iterator[Tensor]) -> None:
        while batch := list(islice(clips, self.batch)):
            moved = torch.stack(batch).to(self.device, non_blocking=True)
            with autocast(self.precision, self.device):
                encode(self.encoder, self.card.clip, moved, self.card.pooling).float().cpu().numpy()

    def decoded(self, contents: Sequence[bytes]) -> Iterator[Tensor]:
        return self.pool.map(self._clip, contents)

    def _clip(self, content: bytes) -> Tensor:
        reader = self.readers.get()
        try:
            return cut_clips(reader.read_file("item", file_chooser(self.card), content), self.card)[0]
        finally:
            self.readers.put(reader)

    def close(self) -> None:
        self.pool.shutdown()
        while not self.readers.empty():
            self.readers.get().close()


async def run_closed_loop(engine: Engine, contents: Sequence[bytes], concurrency: int) -> None:
    """Run clients in a closed loop: each client sends its next item as soon as it receives a result."""
    remaining = iter(contents)

    async def client() -> None:
        for content in remaining:
            await engine.infer("main", [Item(content)], InferenceOptions(), DEADLINE_S)

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def latencies(engine: Engine, contents: Sequence[bytes], per_s: float) -> list[float]:
    """Send requests in an open loop, regardless of pending requests. Returns the sorted latencies in seconds."""
    rng, durations_s = random.Random(0), list[float]()

    async def one(content: bytes) -> None:
        began = time.perf_counter()
        await engine.infer("main", [Item(content)], InferenceOptions(), DEADLINE_S)
        durations_s.append(time.perf_counter() - began)

    due, tasks = time.perf_counter(), []
    for content in contents:
        due += rng.expovariate(per_s)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(content)))
    await asyncio.gather(*tasks)
    return sorted(durations_s)


class BenchmarkClock:
    """Records, at construction, the wall time and the CPU time of this process and its children, in seconds."""

    def __init__(self) -> None:
        self.wall = time.perf_counter()
        children = psutil.Process().children()
        self.cpu = time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


def small_picture(clip: ClipConfig) -> bytes:
    height, width = clip.size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


def files(video: bool, folder: Path) -> list[bytes]:
    if video:
        path = write_video(folder / "a.mp4", scene(300, 340, 256), gop=12, options={"preset": "medium", "crf": "26"})
        return [path.read_bytes()]
    file = io.BytesIO()
    Image.fromarray(scene(1, 500, 376)[0]).save(file, "JPEG", quality=90)
    return [file.getvalue()]


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    clip = ClipConfig() if options.video else ClipConfig(frames=1, tubelet=1)
    config = EncoderConfig(size=options.size)
    url = str(folder / "encoder")
    save_encoder(url, Encoder(config, clip.grid, clip.token_values), Card(id="bench", encoder=config, clip=clip))
    settings = EngineSettings(
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        decoders=options.decoders,
        max_batch_tokens=options.batch_tokens,
    )
    torch.set_num_threads(options.threads)
    engine, offline = Engine(settings), Offline(url, settings)
    await engine.load("main", url)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if offline.device.type == "cuda" else f"{options.threads} CPU threads",
        "encoder": f"{options.size}, {clip.grid.tokens} tokens, {options.dtype}",
        "concurrency": options.concurrency,
        "batch": offline.batch,
        "decoders": options.decoders,
    }
    for stage, contents in (("forward", [small_picture(clip)]), ("decoding", files(options.video, folder))):
        items = list(islice(cycle(contents), options.items))
        clips = list(islice(offline.decoded(contents), 1)) * options.items

        def offline_turn(stage: str = stage, items: list[bytes] = items, clips: list[Tensor] = clips) -> None:
            offline.forward(iter(clips) if stage == "forward" else offline.decoded(items))

        await run_closed_loop(engine, items[: options.concurrency], options.concurrency)
        await asyncio.to_thread(offline_turn)
        rates, costs = list[tuple[float, float]](), list[float]()
        before = engine.state()["counters"]
        for _ in range(options.turns):
            began = BenchmarkClock()
            offline_turn()
            between = BenchmarkClock()
            await run_closed_loop(engine, items, options.concurrency)
            end = BenchmarkClock()
            rates.append((options.items / (between.wall - began.wall), options.items / (end.wall - between.wall)))
            costs.append((between.cpu - began.cpu) / (end.cpu - between.cpu))
        after = engine.state()["counters"]
        sorted_s = await latencies(engine, items, statistics.median(ours for _, ours in rates) / 2)
        results[stage] = {
            "offline_per_s": round(statistics.median(theirs for theirs, _ in rates), 1),
            "engine_per_s": round(statistics.median(ours for _, ours in rates), 1),
            "ratio": round(statistics.median(ours / theirs for theirs, ours in rates), 3),
            "cpu_ratio": round(statistics.median(costs), 3),
            "ratios": [round(ours / theirs, 3) for theirs, ours in rates],
            "clips_a_batch": round((after["clips"] - before["clips"]) / (after["batches"] - before["batches"]), 1),
            "p50_ms_at_half_load": round(1e3 * sorted_s[len(sorted_s) // 2], 1),
            "p99_ms_at_half_load": round(1e3 * sorted_s[int(len(sorted_s) * 0.99)], 1),
        }
    await engine.close()
    offline.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--video", action="store_true")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--items", type=int, default=96, help="Number of items per turn.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, help="Tokens per batch. Default: the engine's default.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(measure(options, Path(folder)))
    if options.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name}: {value}" if not isinstance(value, dict) else name)
        for key, number in value.items() if isinstance(value, dict) else ():
            print(f"  {key:22s} {number}")


if __name__ == "__main__":
    main()
