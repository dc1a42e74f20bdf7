"""Serve the application with a reconciler on a real loopback port. By default, jobs succeed immediately."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import uvicorn
from sqlalchemy import Engine

from service.app import create_app
from service.auth.api_keys import ensure_admin_key
from service.db.leases import LeaseKeeper
from service.jobs.execution.external import ExternalRunDiscovery
from service.jobs.execution.protocol import AttemptOutcome, DriverPolicy, JobFolder
from service.jobs.execution.reconciler import Reconciler
from service.registry.discovery import EncoderDiscovery
from service.registry.scanner import StorageScanner
from service.settings import Settings
from service.stack.ports import free_ports
from tests.support.service.fake_cluster import FakeCluster


class InstantCluster(FakeCluster):
    """A fake cluster on which jobs succeed immediately."""

    def submit(
        self, submission_id: str, job_id: str, attempt: int, root: str, deadline_s: float, policy: DriverPolicy
    ) -> None:
        super().submit(submission_id, job_id, attempt, root, deadline_s, policy)
        JobFolder(root, job_id).write_heartbeat(attempt, None, AttemptOutcome(state="succeeded", ended=time.time()))


class Server(NamedTuple):
    """A running application and its admin key."""

    url: str
    key: str
    app: Any

    def http_client(self, **options: Any) -> httpx.Client:
        """Return a client of `/v1` with the admin key."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=f"{self.url}/v1", headers=headers, timeout=60, **options)


@contextmanager
def serve_app(app: Any, **options: Any) -> Iterator[str]:
    """Serve an ASGI app in a background thread; yield its URL. Connections wait until the server accepts them.

    `options` are passed to uvicorn. The server stops without waiting for open connections.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


@contextmanager
def serving(engine: Engine, folder: Path, cluster: FakeCluster | None = None, **settings: Any) -> Iterator[Server]:
    nowhere = {
        "ray_dashboard": "http://127.0.0.1:1",
        "serve_url": "http://127.0.0.1:1",
    }  # no real cluster
    defaults = {"data_dir": folder, "storage": str(folder / "root"), "reconcile_s": 0.05, **nowhere}
    chosen = Settings(**{**defaults, **settings})
    ensure_admin_key(engine, chosen.admin_key_path)
    app = create_app(chosen, engine=engine, cluster=cluster or InstantCluster())
    port, stop = free_ports(1)[0], threading.Event()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    encoders = EncoderDiscovery(app.state.encoders, chosen.root)
    reconciler = Reconciler(app.state.jobs, app.state.cluster, chosen, encoders)
    runs = ExternalRunDiscovery(app.state.jobs, app.state.cluster, chosen.root)
    scanner = StorageScanner(runs, encoders, LeaseKeeper(engine, "discovery"))
    app.state.monitors += [reconciler.monitor, scanner.monitor]
    threads = [
        threading.Thread(target=server.run),
        threading.Thread(target=reconciler.run, args=(stop,)),
        threading.Thread(target=scanner.run, args=(stop,)),
    ]
    for thread in threads:
        thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield Server(f"http://127.0.0.1:{port}", chosen.admin_key_path.read_text().strip(), app)
    finally:
        stop.set()
        server.should_exit = True
        for thread in threads:
            thread.join()
