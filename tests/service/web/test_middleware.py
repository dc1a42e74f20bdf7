"""Tests for the access log, and for request IDs in responses, errors and the access log."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import anyio
import pytest
from asgi_correlation_id import CorrelationIdFilter
from fastapi import FastAPI, Request
from sqlalchemy import Engine
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from service.web import error_handlers
from service.web.middleware import AccessLogMiddleware


@pytest.fixture
def client(sqlite_engine: Engine, tmp_path: Path) -> TestClient:
    return TestClient(create_app(Settings(data_dir=tmp_path, storage=str(tmp_path)), engine=sqlite_engine))


def test_a_well_formed_request_id_appears_in_responses_errors_and_the_access_log(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.addFilter(CorrelationIdFilter())
    with caplog.at_level(logging.INFO, "service.access"):
        response = client.get("/v1/nothing", headers={"X-Request-Id": "my.request-1_a"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "my.request-1_a"
    (record,) = [record for record in caplog.records if record.name == "service.access"]
    assert record.correlation_id == "my.request-1_a"
    assert re.fullmatch(r"GET /v1/nothing 404 [\d.]+ ms", record.getMessage())


@pytest.mark.parametrize("given", ["", "two words", "a" * 65, "x\ty", "é"])
def test_a_missing_or_malformed_request_id_is_replaced(client: TestClient, given: str) -> None:
    header = {"X-Request-Id": given.encode()} if given else {}
    ids = {client.get("/livez", headers=header).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "service.access"]


def test_a_path_cannot_forge_a_line_in_the_access_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "service.access"):
        client.get("/v1/nope%0AERROR%20all%20jobs%20are%20lost%E2%80%A8")
        client.get("/v1/" + "x" * 5000)
    forged, long = logged(caplog)
    assert forged.startswith("GET /v1/nope%0AERROR%20all%20jobs%20are%20lost%E2%80%A8 404 ")
    assert len(long) < 1100


def send_request(path: str, body: bytes = b"", leaves: bool = True) -> list[Any]:
    """Send a request with the first half of a body, then disconnect; return the response messages."""
    app, sent = FastAPI(), list[Any]()

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(0)
        return "late"

    @app.post("/body")
    async def read(request: Request) -> int:
        return len([part async for part in request.stream()])

    @app.get("/waits")
    async def waits(request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0)
        raise ClientDisconnect

    @app.get("/cancelled")
    async def cancelled() -> None:
        raise asyncio.CancelledError

    @app.get("/broken")
    async def broken() -> None:
        raise anyio.BrokenResourceError

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError

    error_handlers.install(app)
    size = 2 * len(body)
    messages = [{"type": "http.request", "body": body, "more_body": size > 0}]

    async def receive() -> Any:
        if not messages and not leaves:
            await asyncio.Event().wait()
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", str(size).encode())] if size else []
    scope = {"type": "http", "method": "POST" if size else "GET", "path": path, "headers": headers, "query_string": b""}
    scope |= {"server": ("test", 80), "client": None, "scheme": "http", "root_path": "", "http_version": "1.1"}
    app.add_middleware(AccessLogMiddleware)
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.mark.parametrize("path", ["/slow", "/waits", "/cancelled", "/broken"])
def test_a_disconnect_before_the_response_is_logged_once_with_status_499(
    caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with caplog.at_level(logging.INFO):
        send_request(path)
    (line,) = [record.getMessage() for record in caplog.records if record.name != "asyncio"]
    assert re.fullmatch(rf"GET {path} 499 [\d.]+ ms", line)


def test_a_disconnect_while_sending_the_body_is_logged_once_with_status_499(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        send_request("/body", b"half")
    (line,) = logged(caplog)
    assert line.startswith("POST /body 499 ")


def test_completed_requests_are_logged_with_their_status_and_errors_with_status_500(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert send_request("/slow", leaves=False)[0]["status"] == 200
        with pytest.raises(ZeroDivisionError):
            send_request("/bug")
    slow, bug = logged(caplog)
    assert slow.startswith("GET /slow 200 ")
    assert bug.startswith("GET /bug 500 ")
