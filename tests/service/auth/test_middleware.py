"""Tests that keys and limits are checked before a body is read, and that each caller's concurrency is limited."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request
from fastapi.routing import iter_route_contexts
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from service.app import create_app
from service.auth.authentication import Inferrer, Reader
from service.auth.concurrency import ConcurrencyLimit
from service.serving.routes import INFERENCE_PATHS
from service.settings import Settings
from service.web.errors import TooMany
from tests.support.service.apps import client_of, key_to
from tests.support.service.fake_cluster import FakeCluster

router = APIRouter()


@router.post("/read")
async def read(request: Request, caller: Reader) -> int:
    return len(await request.body())


@router.get("/public")
async def public() -> str:
    return "public"


@router.get("/private")
async def private(caller: Reader) -> str:
    return caller.id


@router.get("/encoders/{name}/embeddings")
async def infer(name: str, caller: Inferrer) -> str:
    return caller.id


def request_in_parts(app: Any, path: str, header: dict[str, str], **headers: str) -> tuple[int, int]:
    """Send an endless body in parts; return the status and the number of parts read before the response."""
    read, statuses = 0, list[tuple[int, int]]()

    async def receive() -> Any:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * 2**16, "more_body": True}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append((message["status"], read))

    raw = [(name.lower().encode(), value.encode()) for name, value in {**header, **headers}.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b"", "client": ("a", 1)}
    scope |= {"server": ("test", 80), "scheme": "http", "root_path": "", "http_version": "1.1"}
    asyncio.run(app(scope, receive, send))
    (result,) = statuses
    return result


@pytest.fixture
def app(sqlite_engine: Engine, tmp_path: Path) -> Any:
    settings = Settings(storage=str(tmp_path), data_dir=tmp_path, failure_limit="10/minute", rate_limit="1/minute")
    return create_app(settings, engine=sqlite_engine, cluster=FakeCluster())


@pytest.mark.parametrize("path", ["/openai/v1/embeddings", "/v1/jobs", "/v1/unknown", "/metrics", "/livez", "/readyz"])
@pytest.mark.parametrize("length", ["64000000", None])
def test_the_body_of_a_request_without_a_valid_key_is_never_read(
    sqlite_engine: Engine, app: Any, path: str, length: str
) -> None:
    size = {"Content-Length": length} if length else {"Transfer-Encoding": "chunked"}
    expired = key_to(sqlite_engine, "admin", expires_at=1.0)
    statuses = [
        request_in_parts(app, path, header, **size, **{"Content-Type": "application/json"})
        for header in ({}, {"Authorization": "Bearer x"}, expired)
    ]
    assert statuses == [(401, 0)] * 3


def test_the_body_of_a_rate_limited_request_is_not_read(sqlite_engine: Engine, app: Any) -> None:
    header = key_to(sqlite_engine, "admin")
    chunked = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    status, read = request_in_parts(app, "/v1/jobs", header, **chunked)
    assert (status, read > 0) == (413, True)
    assert request_in_parts(app, "/v1/jobs", header, **chunked) == (429, 0)
    for _ in range(10):
        assert request_in_parts(app, "/v1/jobs", {}, **chunked) == (401, 0)
    assert request_in_parts(app, "/v1/jobs", {}, **chunked) == (429, 0)


def test_requests_to_public_and_unknown_routes_do_not_count_as_failed_authentications(sqlite_engine: Engine) -> None:
    client = client_of(sqlite_engine, router, settings=Settings(failure_limit="1/minute"))
    for header in ({}, {"Authorization": "Bearer wrong"}):
        for _ in range(3):
            assert client.get("/v1/public", headers=header).status_code == 200
            assert client.get("/v1/unknown", headers=header).status_code == 404
    assert [client.get("/v1/private").status_code for _ in range(2)] == [401, 429]


def test_inference_requests_have_a_separate_rate_limit(sqlite_engine: Engine) -> None:
    settings = Settings(rate_limit="1/minute", inference_rate_limit="2/minute")
    client, header = client_of(sqlite_engine, router, settings=settings), key_to(sqlite_engine, "read")
    for path, statuses in (("/v1/private", [200, 429]), ("/v1/encoders/a/embeddings", [200, 200, 429])):
        assert [client.get(path, headers=header).status_code for _ in statuses] == statuses


def test_inference_paths_match_exactly_the_inference_routes(app: Any) -> None:
    posts = {route.path for route in iter_route_contexts(app.routes) if "POST" in (route.methods or ())}
    matching = {path for path in posts if INFERENCE_PATHS.fullmatch(path.replace("{", "").replace("}", ""))}
    tasks = ("embeddings", "classifications", "reconstructions")
    expected = {f"/v1/encoders/{{encoder}}/{task}" for task in tasks}
    assert matching == expected | {"/openai/v1/embeddings", "/v1/jobs/{job_id}/neighbours", "/v1/lab/masks"}


def test_a_database_outage_is_reported_before_a_body_is_read(
    sqlite_engine: Engine, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(app.state.authenticator._keys, "_read", fail)
    header = key_to(sqlite_engine, "admin")
    chunked = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    assert request_in_parts(app, "/v1/jobs", header, **chunked) == (503, 0)
    response = TestClient(app).get("/v1/jobs", headers=header)
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")


def test_concurrent_requests_are_limited_per_key_and_for_anonymous_callers_but_not_for_probes(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    settings = Settings(storage=str(tmp_path), data_dir=tmp_path, concurrency_limit=2, anonymous_concurrency_limit=3)
    app = create_app(settings, engine=sqlite_engine, cluster=FakeCluster())
    release, waiting = asyncio.Event(), asyncio.Semaphore(0)

    @app.get("/wait")
    async def wait() -> None:
        waiting.release()
        await release.wait()

    first, second = key_to(sqlite_engine, "read"), key_to(sqlite_engine, "read")

    async def check() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            callers = [first] * 2 + [{}, {}, {"Authorization": "Bearer x"}]
            held = [asyncio.create_task(client.get("/wait", headers=header)) for header in callers]
            for _ in held:
                await waiting.acquire()
            for path, header in (("/v1/jobs", first), ("/metrics", {}), ("/v1/unknown", {"Authorization": "Bearer x"})):
                response = await client.get(path, headers=header)
                assert (response.status_code, response.headers["Retry-After"]) == (429, "1"), path
                assert response.headers["Content-Type"] == "application/problem+json"
                assert response.json()["code"] == "rate_limited"
            assert (await client.get("/v1/jobs", headers=second)).status_code == 200
            for path in ("/livez", "/readyz"):
                for header in ({}, first):
                    assert (await client.get(path, headers=header)).status_code == 200
            release.set()
            assert {response.status_code for response in await asyncio.gather(*held)} == {200}
            assert (await client.get("/v1/jobs", headers=first)).status_code == 200
            assert (await client.get("/metrics")).status_code == 200

    asyncio.run(check())


def test_a_failed_request_releases_its_slot() -> None:
    limit = ConcurrencyLimit(1)

    def fail(caller: str) -> None:
        with limit.slot(caller, "requests"):
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail("a")
    with limit.slot("a", "requests"):
        with pytest.raises(TooMany, match="1 requests are in progress"):
            fail("a")
        with pytest.raises(ZeroDivisionError):
            fail("b")
