"""Tests for limits on request bodies: size, JSON values, the memory budget, and connections that stall or close."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterable
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Body, FastAPI, Request
from starlette.testclient import TestClient

from service.web import error_handlers, request_bodies
from service.web.request_bodies import (
    INLINE_BYTES,
    LINGER_BYTES,
    MAX_JSON_VALUES,
    BodyBudget,
    BodyLimitMiddleware,
    LargeJsonRoute,
    reserve_reply,
    run_by_size,
)

JSON = {"Content-Type": "application/json"}
LIMIT, FILES_LIMIT = 1000, 4 * INLINE_BYTES


class BodiesFixture:
    """An app that returns the size of each request body; only /files accepts files."""

    def __init__(self, budget: int = 2 * FILES_LIMIT) -> None:
        self.budget, self.parts, self.used = BodyBudget(budget), list[int](), list[int]()
        app = FastAPI()

        @app.post("/files")
        @app.post("/json")
        async def read(request: Request) -> int:
            self.used.append(self.budget.used)
            self.parts = [len(part) async for part in request.stream() if part]
            return sum(self.parts)

        error_handlers.install(app)
        self.routes = app
        self.app = BodyLimitMiddleware(app, LIMIT, re.compile("/files"), FILES_LIMIT, self.budget)
        self.client = TestClient(self.app)

    def send(self, messages: Iterable[dict[str, Any]], headers: dict[str, str]) -> list[Any]:
        """Send these ASGI messages to /files; return the response messages, then a list of the unread messages."""
        pending, sent = list(messages), list[Any]()

        async def receive() -> Any:
            return pending.pop(0) if pending else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/files", "headers": raw, "query_string": b"", "state": {}}
        scope |= {"app": self.app, "client": None, "server": ("test", 80), "scheme": "http", "root_path": ""}
        asyncio.run(asyncio.wait_for(self.app(scope, receive, send), 60))
        return [*sent, pending]


def body_part(size: int, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


def test_a_body_reaches_the_route_in_a_bounded_number_of_parts() -> None:
    fixture = BodiesFixture()
    parts = [body_part(1000)] * 599 + [body_part(1000, more=False)]
    assert fixture.send(parts, {"Transfer-Encoding": "chunked"})[0]["status"] == 200
    assert sum(fixture.parts) == 600_000
    assert len(fixture.parts) == 3  # joined, since each object would take memory of its own
    assert fixture.budget.used == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_for_its_path_is_rejected(chunked: bool) -> None:
    fixture = BodiesFixture()
    for path, limit in (("/json", LIMIT), ("/files", FILES_LIMIT)):
        for size, status in ((limit, 200), (limit + 1, 413)):
            content = b"1" * size
            response = fixture.client.post(path, content=iter([content]) if chunked else content, headers=JSON)
            assert response.status_code == status, (path, size)
    assert response.json()["code"] == "body_too_large"
    assert fixture.budget.used == 0


def test_bodies_over_the_budget_are_rejected_until_other_requests_finish() -> None:
    fixture = BodiesFixture(budget=FILES_LIMIT)
    fixture.budget.reserve(1000)
    for content in (b"x" * (FILES_LIMIT - 999), iter([b"x" * (FILES_LIMIT - 999)])):
        response = fixture.client.post("/files", content=content)
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
        assert response.json()["code"] == "overloaded"
        assert fixture.budget.used == 1000
    assert fixture.client.post("/files", content=b"x" * (FILES_LIMIT - 1000)).status_code == 200
    assert fixture.used == [FILES_LIMIT]  # reserved while the route runs
    assert fixture.budget.used == 1000


def test_a_reply_counts_against_the_budget_until_the_request_ends() -> None:
    fixture = BodiesFixture(budget=FILES_LIMIT)

    def reply(request: Request) -> int:
        reserve_reply(request, FILES_LIMIT - 10)
        return fixture.budget.used

    fixture.routes.add_api_route("/reply", reply, methods=["POST"])
    headers = {"Content-Type": "application/json"}
    assert fixture.client.post("/reply", content=b"0" * 10, headers=headers).json() == FILES_LIMIT
    assert fixture.budget.used == 0
    response = fixture.client.post("/reply", content=b"0" * 11, headers=headers)
    assert (response.status_code, response.json()["code"]) == (429, "overloaded")
    assert fixture.budget.used == 0


def test_the_number_of_values_in_a_json_body_is_limited() -> None:
    fixture = BodiesFixture()
    fits = b"[" + b"1," * MAX_JSON_VALUES + b"1]"
    assert fixture.client.post("/files", content=fits, headers=JSON).status_code == 200
    response = fixture.client.post("/files", content=b"[1," + fits[1:], headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    assert str(MAX_JSON_VALUES) in response.json()["detail"]
    assert fixture.client.post("/files", content=b"[1," + fits[1:]).status_code == 200  # a file, not JSON


def test_a_rejected_body_is_discarded_up_to_a_limit_and_the_connection_is_closed() -> None:
    fixture = BodiesFixture()
    parts = [body_part(2**18) for _ in range(100)]
    start, *rest, pending = fixture.send(parts, {"Content-Length": str(100 * 2**18)})
    assert start["status"] == 413
    assert (b"connection", b"close") in start["headers"]
    assert [message["more_body"] for message in rest] == [True, False]
    assert len(parts) - len(pending) == LINGER_BYTES // 2**18
    assert fixture.budget.used == 0


def test_a_body_that_stops_arriving_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_bodies, "STALL_S", 0.0)
    monkeypatch.setattr(request_bodies, "LINGER_S", 0.0)
    fixture = BodiesFixture()
    start, *_ = fixture.send([], {"Content-Length": "20"})
    assert start["status"] == 408
    assert fixture.budget.used == 0


def test_a_disconnected_caller_releases_its_reservation_and_gets_no_response() -> None:
    fixture = BodiesFixture()
    sent = fixture.send([body_part(5), {"type": "http.disconnect"}], {"Content-Length": "20"})
    assert sent == [[]]
    assert fixture.budget.used == 0
    assert fixture.used == []


def test_large_values_are_processed_in_a_thread() -> None:
    async def names() -> list[str]:
        return [await run_by_size(size, lambda: threading.current_thread().name) for size in (1, INLINE_BYTES + 1)]

    small, large = asyncio.run(names())
    assert small == threading.current_thread().name
    assert large != small


def test_a_large_json_body_is_parsed_in_a_thread_and_reports_the_same_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def loads(body: bytes) -> Any:
        threads.append(threading.current_thread())
        return original(body)

    original = request_bodies.json.loads
    monkeypatch.setattr(request_bodies.json, "loads", loads)
    router = APIRouter(route_class=LargeJsonRoute)

    @router.post("/")
    async def read(text: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        return {"length": len(text), "thread": threading.current_thread() in threads}

    app = FastAPI()
    app.include_router(router)
    error_handlers.install(app)
    client = TestClient(app)
    for size in (1, INLINE_BYTES):
        assert client.post("/", json={"text": "x" * size}).json() == {"length": size, "thread": size == 1}
    for body in (b'{"text":', b'{"text": "' + b"x" * INLINE_BYTES):
        response = client.post("/", content=body, headers=JSON)
        assert (response.status_code, response.json()["code"]) == (400, "json_invalid")
    assert client.post("/", json=["x" * INLINE_BYTES]).status_code == 422
