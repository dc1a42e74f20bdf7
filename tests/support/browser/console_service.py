"""A service for browser tests and screenshots, with realistic data, a fake cluster, and a lab in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from sqlalchemy import Engine

from service.db.engine import migrate, open_engine
from service.jobs.execution.protocol import JobFolder
from service.jobs.execution.ray_jobs import RayJobStatus
from service.jobs.execution.reconciler import submission_id
from service.jobs.store import JobStore
from service.serving.gateway import EncoderReply
from tests.support.browser import scenes
from tests.support.browser.embedded_digits import add_embedded_digits
from tests.support.service.fake_cluster import FakeCluster, report_status
from tests.support.service.local_lab import LocalLab
from tests.support.service.server import Server, serving

PATIENCE_MS = 60_000  # the machine may be busy
EMBEDDED_SAMPLES = 2000


class ConsoleService(NamedTuple):
    """A running service, its fake cluster, whose jobs the tests advance, and its mask lab."""

    server: Server
    cluster: FakeCluster
    lab: LocalLab
    root: str

    def api(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.server.key}"}
        response = httpx.request(method, f"{self.server.url}/v1{path}", headers=headers, timeout=60, **options)
        response.raise_for_status()
        return response.json() if response.content else None

    def key(self, scope: str) -> str:
        return str(self.api("POST", "/keys", json={"name": f"a {scope} key", "scopes": [scope]})["key"])

    def report(self, job_id: str, state: str | None = None, **facts: Any) -> None:
        """Report the progress or the outcome of a job's newest attempt, once the job has started."""
        jobs = self.server.app.state.jobs
        until = time.monotonic() + PATIENCE_MS / 1000
        while jobs.get(job_id).state not in ("starting", "running", "cancelling"):
            assert time.monotonic() < until, jobs.get(job_id).state
            time.sleep(0.05)
        report_status(self.root, jobs.get(job_id), state, **facts)


@contextmanager
def console_service(folder: Path, add: Callable[[Engine, str], None]) -> Iterator[ConsoleService]:
    """Serve the console with data in `folder`. `add`: adds to the database and the storage root before it starts."""
    engine = open_engine(f"sqlite:///{folder / 'control-plane.db'}")
    migrate(engine)
    cluster = FakeCluster(cpus=8.0)
    cluster.node_list = scenes.nodes()
    many = {"rate_limit": "100000/minute", "failure_limit": "100000/minute"}
    root, store = str(folder / "root"), JobStore(engine)
    scenes.populate(engine, root)
    for seed, job_id in enumerate((scenes.EMBEDDED, scenes.OTHER_EMBEDDED)):
        name = f"Digits, embedded by encoder {'AB'[seed]}"
        add_embedded_digits(store, root, EMBEDDED_SAMPLES, seed, id=job_id, name=name)
    add(engine, root)
    _report_alive(store, cluster, root)  # before the service checks the jobs
    with serving(engine, folder, cluster, storage=root, **many) as server:
        _serve_vectors(server.app.state.gateway)
        lab = LocalLab(server.app)
        stop = threading.Event()
        beating = threading.Thread(target=_keep_alive, args=(server.app.state.jobs, cluster, root, stop))
        beating.start()
        yield ConsoleService(server, cluster, lab, root)
        stop.set()
        beating.join()
        lab.engine.close()


def _keep_alive(store: JobStore, cluster: FakeCluster, root: str, stop: threading.Event) -> None:
    """Send heartbeats for the jobs stored as running, so that the service does not restart them."""
    while not stop.wait(0.2):
        _report_alive(store, cluster, root)


def _report_alive(store: JobStore, cluster: FakeCluster, root: str) -> None:
    for job_id in (scenes.RUNNING, scenes.SWEEP):
        job = store.get(job_id)
        cluster.jobs.setdefault(submission_id(job, job.attempt), RayJobStatus("RUNNING"))
        JobFolder(root, job_id).write_heartbeat(job.attempt, job.progress)


def _serve_vectors(gateway: Any) -> None:
    """Make the gateway return vectors as a replica would, because no replica runs in these tests."""

    async def infer(request: Any, name: str, project: Any, items: Any, options: Any, *more: Any, **rest: Any) -> Any:
        found: dict[str, Any] = {"embedding": [0.1 * (index % 7) - 0.3 for index in range(64)]}
        if options["task"] == "classification":
            found = {"labels": ["three", "eight"], "scores": [0.91, 0.06]}
        return EncoderReply(name, [found], None, 100)

    async def replica_state(deployment: Any) -> dict[str, Any]:
        drift = {"items": 40, "cosine_mean": 0.94, "cosine_min": 0.71, "neighbours": 10, "neighbours_kept": 0.83}
        return {"drift": drift, "trouble": {}}

    gateway.infer, gateway.replica_state = infer, replica_state
