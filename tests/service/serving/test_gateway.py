"""Tests for converting replica replies to HTTP responses, with a fake Ray Serve; tests/flows uses a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect

from service.serving.deployments import new_deployment
from service.serving.gateway import LOOKUP_CACHE_S, Gateway
from service.serving.protocol import pack, pack_refusal, unpack
from service.serving.schemas import ServingSettings
from service.web import error_handlers
from service.web.errors import Refusal, invalid_item

ServeReply = Callable[[httpx.Request], httpx.Response]


class OneDeployment:
    """A deployment lookup that finds only `images`."""

    def __init__(self) -> None:
        self._deployment = new_deployment(
            "images", "default", "me", encoder="first", candidate=None, share=0.0, settings=ServingSettings()
        )
        self._deployment.serving = {"main": "first"}
        self.lookups = 0

    def find_serving(self, name: str, project: str | None) -> Any:
        self.lookups += 1
        return self._deployment if name == "images" else None


class GatewayFixture:
    """A gateway behind a route; `reply` returns Ray Serve's response."""

    def __init__(self) -> None:
        self.reply: ServeReply = lambda _: httpx.Response(200, content=pack({"encoder": "first", "items": []}))
        self.requests = 0
        self.calls = list[Any]()
        self.deployments = OneDeployment()
        self.gateway = Gateway(self.deployments, "http://serve")
        self.gateway._client = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))
        app = FastAPI()

        @app.post("/{name}")
        async def infer(request: Request, name: str) -> Any:
            await request.body()
            reply = await self.gateway.infer(request, name, None, [], {"task": "embedding"}, deadline_s=5.0)
            return {"encoder": reply.encoder}

        error_handlers.install(app)
        self.client = TestClient(app, raise_server_exceptions=False)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        self.calls.append(unpack(request.content))
        return self.reply(request)

    def count(self, outcome: str, deployment: str = "images") -> float | None:
        labels = {"deployment": deployment, "task": "embedding", "outcome": outcome}
        return self.gateway.metrics.registry.get_sample_value("amd_inference_seconds_count", labels)


@pytest.fixture
def fixture() -> GatewayFixture:
    return GatewayFixture()


def test_a_reply_is_forwarded(fixture: GatewayFixture) -> None:
    response = fixture.client.post("/images")
    assert (response.status_code, response.json()) == (200, {"encoder": "first"})
    assert fixture.count("ok") == 1


def test_requests_and_their_batches_are_measured_by_deployment(fixture: GatewayFixture) -> None:
    reply = {"encoder": "first", "items": [], "queue_s": 0.25, "batch_fill": 0.5}
    in_flight = list[float | None]()

    def measured(name: str) -> float | None:
        return fixture.gateway.metrics.registry.get_sample_value(name, {"deployment": "images"})

    def answer(_: httpx.Request) -> httpx.Response:
        in_flight.append(measured("amd_inference_in_flight"))
        return httpx.Response(200, content=pack(reply))

    fixture.reply = answer
    assert fixture.client.post("/images").status_code == 200
    assert fixture.client.post("/other").status_code == 409
    assert (in_flight, measured("amd_inference_in_flight")) == ([1], 0)
    assert measured("amd_inference_queue_seconds_sum") == 0.25
    assert measured("amd_inference_batch_fill_sum") == 0.5
    assert (fixture.count("ok"), fixture.count("encoder_not_deployed", deployment="")) == (1, 1)
    del reply["queue_s"], reply["batch_fill"]  # as in a reply from an earlier version's replica
    assert fixture.client.post("/images").status_code == 200
    assert measured("amd_inference_batch_fill_count") == 1


def test_lookups_are_cached_briefly_even_for_names_without_a_deployment(
    fixture: GatewayFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(fixture.gateway._lookups, "_clock", lambda: now)
    for _ in range(2):
        assert fixture.client.post("/images").status_code == 200
        assert fixture.client.post("/other").status_code == 409
    assert fixture.deployments.lookups == 2
    now += LOOKUP_CACHE_S
    assert fixture.client.post("/images").status_code == 200
    assert fixture.deployments.lookups == 3


@pytest.mark.parametrize(
    ("refusal", "status", "retry_after", "members"),
    [
        (invalid_item(2, "is empty"), 422, None, {"index": 2, "reason": "is empty"}),
        (Refusal("input_unavailable", "input 2: s3://a/b could not be read", index=2), 503, "5", {"index": 2}),
        (Refusal("not_possible", "layers=9: first has 2 blocks"), 422, None, {}),
        (Refusal("overloaded", "the queue is full", retry_after=2.6), 429, "3", {"retry_after": 2.6}),
        (Refusal("overloaded", "the queue is full", retry_after=0.1), 429, "1", {"retry_after": 0.1}),
        (Refusal("deadline_exceeded", "too late"), 504, "1", {}),
    ],
    ids=lambda value: value.code if isinstance(value, Refusal) else None,
)
def test_a_refusal_by_a_replica_is_returned_as_problem_details(
    fixture: GatewayFixture, refusal: Refusal, status: int, retry_after: str | None, members: dict[str, Any]
) -> None:
    fixture.reply = lambda _: httpx.Response(status, content=pack_refusal(refusal))
    response = fixture.client.post("/images")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers.get("retry-after") == retry_after
    assert response.json() == {
        "type": f"urn:amd:problem:{refusal.code}",
        "title": httpx.codes.get_reason_phrase(status),
        "status": status,
        "detail": refusal.message,
        "code": refusal.code,
        "request_id": "",
        "retryable": retry_after is not None,
        "errors": [],
        **members,
    }
    assert fixture.requests == 1
    assert fixture.count(refusal.code) == 1


@pytest.mark.parametrize(
    ("reply", "detail", "requests"),
    [
        (
            lambda _: httpx.Response(503, content=pack_refusal(Refusal("encoder_unavailable", "nothing is loaded"))),
            "images: nothing is loaded",
            2,
        ),
        (
            lambda _: httpx.Response(429, content=pack({"error": "of another version", "message": "why"})),
            "images: why",
            1,
        ),
        (lambda _: httpx.Response(500, text="died"), "images: no replica responded (Ray Serve returned 500)", 2),
        (
            lambda _: httpx.Response(404, text="no application"),
            "images: no replica is ready yet; the deployment is starting or being restarted",
            1,
        ),
    ],
    ids=["not loaded", "unknown code", "Serve itself", "Serve has no replicas yet"],
)
def test_replica_failures_return_503_and_unknown_codes_are_not_retried(
    fixture: GatewayFixture, reply: ServeReply, detail: str, requests: int
) -> None:
    fixture.reply = reply
    response = fixture.client.post("/images")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert (response.json()["code"], response.json()["detail"]) == ("encoder_unavailable", detail)
    assert fixture.requests == requests


def test_a_timeout_returns_504_and_a_connection_failure_503(fixture: GatewayFixture) -> None:
    def fail(error: Exception) -> ServeReply:
        def raise_error(_: httpx.Request) -> httpx.Response:
            raise error

        return raise_error

    fixture.reply = fail(httpx.ReadTimeout("slow"))
    response = fixture.client.post("/images")
    assert (response.status_code, response.json()["detail"]) == (504, "images: no response within 5 s")
    assert fixture.requests == 1, "a timeout is not retried"
    fixture.reply = fail(httpx.ConnectError("absent"))
    response = fixture.client.post("/images")
    assert response.status_code == 503
    assert response.json()["detail"] == "images: Ray Serve does not respond (ConnectError); it may be starting"
    assert fixture.requests == 3


@pytest.mark.parametrize("error", [httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.ConnectError])
def test_a_request_whose_connection_breaks_is_retried_once(
    fixture: GatewayFixture, error: type[httpx.TransportError]
) -> None:
    """Ray Serve may close an idle connection just when a request is sent on it."""
    succeed = fixture.reply

    def break_first(request: httpx.Request) -> httpx.Response:
        if fixture.requests == 1:
            raise error("closed")
        return succeed(request)

    fixture.reply = break_first
    response = fixture.client.post("/images")
    assert (response.status_code, response.json()) == (200, {"encoder": "first"})
    assert fixture.requests == 2


def test_an_encoder_without_a_deployment_is_reported_as_not_deployed(fixture: GatewayFixture) -> None:
    response = fixture.client.post("/other")
    assert (response.status_code, response.json()["code"]) == (409, "encoder_not_deployed")
    assert "retry-after" not in response.headers
    assert response.json()["detail"] == (
        "no deployment serves 'other'; GET /v1/deployments lists them, and `amd encoders deploy` or "
        "PUT /v1/deployments/{name} creates one"
    )
    assert fixture.requests == 0


def test_a_disconnect_cancels_the_request_and_is_not_counted_as_a_failure(fixture: GatewayFixture) -> None:
    cancelled = False

    async def wait(*_: Any) -> Any:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def leave() -> None:
        fixture.gateway._send = wait  # type: ignore[method-assign]
        request = Request({"type": "http"}, receive)
        with pytest.raises(ClientDisconnect):
            await fixture.gateway.infer(request, "images", None, [], {"task": "embedding"}, deadline_s=5.0)
        await asyncio.sleep(0)

    asyncio.run(leave())
    assert cancelled
    assert (fixture.count("caller_gone"), fixture.count("failed")) == (1, None)


def test_a_request_to_a_replica_states_whether_the_reply_will_be_sent_as_json(fixture: GatewayFixture) -> None:
    async def infer(as_json: bool) -> None:
        async def receive() -> Any:
            return await asyncio.Event().wait()

        request = Request({"type": "http"}, receive)
        options = {"task": "embedding"}
        await fixture.gateway.infer(request, "images", None, [], options, deadline_s=5.0, as_json=as_json)

    for as_json in (True, False):
        asyncio.run(infer(as_json))
        assert fixture.calls[-1]["json"] is as_json
