"""Flood a control plane with 64 MiB bodies sent without a key, and measure memory use and other requests' latency.

Run as `python tests/benchmarks/body_flood.py [--seconds 20]`. Starts `python -m service` with SQLite. 100 clients send
bodies of 1 KiB, then of 64 MiB, while a client with a key calls other routes. Prints statuses, growth of the server's
resident memory, and the latencies of the other routes. Exits with 1 if a body is accepted, memory grows by 64 MiB or
more, or the p99 latency with large bodies exceeds three times the p99 latency with small ones.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx

from tests.support.service.control_plane import ControlPlane

CLIENTS = 100
SMALL, LARGE = 2**10, 64 * 2**20
PART = b"x" * 2**16
OTHER_ROUTES = ("/v1/jobs", "/v1/presets", "/openai/v1/models", "/livez")
REJECTED = {401, 413, 429}
MAX_GROWTH = 64 * 2**20
MAX_RATIO = 3.0
NO_RESPONSE = 0


class Measurement(NamedTuple):
    """Measurements from one phase."""

    statuses: Counter[int]
    latencies_ms: list[float]
    growth: int
    """Peak growth of the server's resident memory during the phase, in bytes."""

    @property
    def p99_ms(self) -> float:
        return self.latencies_ms[int(len(self.latencies_ms) * 0.99)]


async def send_body(port: int, size: int) -> int:
    """Send one body, stopping early if a response arrives, and return its status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /openai/v1/embeddings HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {size}\r\n\r\n".encode())
    response = asyncio.create_task(reader.readline())
    try:
        for start in range(0, size, len(PART)):
            if response.done():
                break
            writer.write(PART[: size - start])
            await writer.drain()
    except ConnectionError:
        pass  # the server closed the connection; its response is read below
    try:
        return int((await response).split()[1])
    except (ConnectionError, IndexError):
        return NO_RESPONSE
    finally:
        writer.close()


def flood(port: int, size: int, seconds: float, results: Any) -> None:
    """Run clients that each send one body after another. Runs in a separate process."""

    async def client(statuses: Counter[int], until: float) -> None:
        while time.monotonic() < until:
            statuses[await send_body(port, size)] += 1

    async def clients() -> Counter[int]:
        statuses, until = Counter[int](), time.monotonic() + seconds
        await asyncio.gather(*(client(statuses, until) for _ in range(CLIENTS)))
        return statuses

    results.put(asyncio.run(clients()))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def measure(plane: ControlPlane, client: httpx.Client, size: int, seconds: float) -> Measurement:
    assert plane.process is not None
    before = highest = resident_bytes(plane.process.pid)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    flooding = context.Process(target=flood, args=(plane.port, size, seconds, results))
    flooding.start()
    latencies_ms = []
    while flooding.is_alive() and results.empty():
        for route in OTHER_ROUTES:
            began = time.perf_counter()
            client.get(route).raise_for_status()
            latencies_ms.append((time.perf_counter() - began) * 1000)
            highest = max(highest, resident_bytes(plane.process.pid))
    statuses = results.get()
    flooding.join()
    return Measurement(statuses, sorted(latencies_ms), highest - before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    folder = Path(tempfile.mkdtemp(prefix="body-flood-"))
    plane = ControlPlane(folder, "http://127.0.0.1:1", AMD_RATE_LIMIT="10000000/minute")
    try:
        plane.start()
        headers = {"Authorization": f"Bearer {plane.key}"}
        with httpx.Client(base_url=plane.url, headers=headers, timeout=60) as client:
            for route in OTHER_ROUTES * 50:  # fills caches and thread pools before the measurement
                client.get(route).raise_for_status()
            found = {size: measure(plane, client, size, seconds) for size in (SMALL, LARGE)}
    finally:
        plane.kill()
    for size, one in found.items():
        print(
            f"{CLIENTS} clients, bodies of {size // 1024} KiB: {sum(one.statuses.values())} requests, statuses "
            f"{dict(one.statuses)}; memory +{one.growth / 2**20:.1f} MiB; {len(one.latencies_ms)} other requests, "
            f"p50 {one.latencies_ms[len(one.latencies_ms) // 2]:.1f} ms, p99 {one.p99_ms:.1f} ms"
        )
    ratio = found[LARGE].p99_ms / found[SMALL].p99_ms
    rejected = all(set(one.statuses) <= REJECTED for one in found.values())
    print(f"ratio of the p99 latencies: {ratio:.2f}")
    return 0 if rejected and found[LARGE].growth < MAX_GROWTH and ratio <= MAX_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
