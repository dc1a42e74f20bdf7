"""Measure the control plane with a long queue, many encoders and many event streams.

Run as `python -m tests.benchmarks.control_plane_scale [--jobs 100000] [--encoders 10000] [--streams 1000]`. Measures
the CPU time of this process and its threads, which other programs on the machine do not affect.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, insert

from amd.storage import write_json
from service.db.engine import migrate, open_engine
from service.db.models import Job, RegisteredEncoder
from service.jobs.schemas import WAITING
from service.jobs.store import JobStore
from service.jobs.streams import JobWatcher, job_events
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from tests.support.service.encoder_cards import card
from tests.support.service.fake_cluster import new_job
from tests.support.service.fake_control_plane import FakeControlPlane

STEPS = 10
CONFIG = {"data": {"train": "demo:digits"}, "filler": ["x" * 40] * 60}  # 3 kB, as a resolved config


def cpu_s(function: Callable[[], object], times: int = 1) -> float:
    began = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - began) / times


def add_jobs(engine: Engine, count: int) -> None:
    columns = Job.__table__.columns
    for start in range(0, count, 5000):
        jobs = [
            new_job(id=f"job-{number:08}", created_at=float(number), not_before=0.0, config=CONFIG)
            for number in range(start, min(count, start + 5000))
        ]
        rows = [{column.name: getattr(job, column.name) for column in columns} | {"version": 1} for job in jobs]
        with engine.begin() as connection:
            connection.execute(insert(Job), rows)


def measure_queue(engine: Engine, folder: Path, jobs: int) -> None:
    add_jobs(engine, jobs)
    plane = FakeControlPlane(engine, folder, max_running=4)
    plane.step(2)  # starts as many jobs as may run
    before = cpu_s(lambda: list(JobStore(engine).in_states(WAITING)))
    after = cpu_s(plane.step, STEPS)
    print(f"{jobs} queued jobs, one step a second: {before:.1%} of a core to load them all, {after:.1%} for a step now")
    encoder = card("unused").model_dump(mode="json")
    row = {"project": "default", "job_id": None, "created_at": 0.0, "card": encoder, "stamp": "", "seen_at": 0.0}
    with engine.begin() as connection:
        connection.execute(insert(RegisteredEncoder), [{"id": "unused", **row}])
    store = EncoderStore(engine)
    print(
        f"  DELETE of an encoder: {cpu_s(lambda: store.delete_encoder('unused', None, str(folder), 'me')):.2f} s of CPU"
    )


def measure_encoders(engine: Engine, folder: Path, encoders: int) -> None:
    for number in range(encoders):
        name = f"encoder-{number:06}"
        write_json(str(folder / "encoders" / name / "encoder.json"), _card(name))
    discovery = EncoderDiscovery(EncoderStore(engine), str(folder))
    began, first = time.monotonic(), 0.0
    while len(EncoderStore(engine).stamps()) < encoders:
        first += cpu_s(discovery.scan)
    took = time.monotonic() - began
    discovery._last_scan = float("-inf")
    scan = cpu_s(discovery.scan)
    print(f"{encoders} encoders: indexed in {took:.0f} s ({first:.0f} s of CPU), then {scan:.2f} s per scan")


def _card(name: str) -> dict[str, Any]:
    return card(name).model_copy(update={"created": datetime.now(UTC)}).model_dump(mode="json")


def measure_streams(engine: Engine, streams: int) -> None:
    store = JobStore(engine)
    job = store.add(new_job(id="watched"), "bench")
    statements = 0

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    async def scenario() -> float:
        watcher = JobWatcher(store)
        polling = asyncio.create_task(watcher.run())

        async def watch() -> None:
            async for _ in job_events(watcher, job, 0):
                pass

        watching = [asyncio.create_task(watch()) for _ in range(streams)]
        await asyncio.sleep(3)
        event.listen(engine, "before_cursor_execute", count)
        began = time.process_time()
        await asyncio.sleep(5)
        idle = (time.process_time() - began) / 5
        store.change(store.get(job.id), "cancel", state="cancelled")
        await asyncio.gather(*watching)
        polling.cancel()
        return idle

    idle = asyncio.run(scenario())
    print(f"{streams} event streams of a job: {idle:.1%} of a core while idle, {statements} statements in 5 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--encoders", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=1_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        for part, count in (("queue", options.jobs), ("encoders", options.encoders), ("streams", options.streams)):
            engine = open_engine(f"sqlite:///{folder / part}.db")
            migrate(engine)
            (folder / part).mkdir()
            if part == "queue":
                measure_queue(engine, folder / part, count)
            elif part == "encoders":
                measure_encoders(engine, folder / part, count)
            else:
                measure_streams(engine, count)
            engine.dispose()


if __name__ == "__main__":
    main()
