"""Tests for inference through both clients: media types, timeouts, and which failures are retried."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow as pa
import pytest

from service.client import ApiError, AsyncClient, Client, NoAnswer
from service.serving.gateway import MARGIN_S, EncoderReply
from service.serving.protocol import ARROW
from service.serving.requests import DEADLINE_S, EncodeRequest, InferenceRequest
from service.serving.responses import ENCODER, NUMPY, negotiate_media_type, render_reply
from tests.support.service.failing_server import QUICK

Respond = Callable[[httpx.Request], httpx.Response]

RNG = np.random.default_rng(0)
ITEMS = [
    {"embedding": RNG.normal(size=4).astype("<f4"), "tokens": RNG.normal(size=(2, 3)).astype("<f4")} for _ in range(3)
]
VIEWS = [
    {"encoder": "first", "index": index, "layers": None, **{name: array.tolist() for name, array in item.items()}}
    for index, item in enumerate(ITEMS)
]


class InferenceCase(NamedTuple):
    call: Callable[..., Any]
    """Call a method of the client by name."""
    requests: list[httpx.Request]


@pytest.fixture(params=["blocking", "async"])
def connect(request: pytest.FixtureRequest) -> Callable[[Respond], InferenceCase]:
    """Return a function that connects each client in turn to a service that sends the given response."""
    requests: list[httpx.Request] = []

    def connected(respond: Respond) -> InferenceCase:
        def record(sent: httpx.Request) -> httpx.Response:
            requests.append(sent)
            return respond(sent)

        options: Any = {"patience": QUICK, "transport": httpx.MockTransport(record)}
        if request.param == "blocking":
            client = Client("http://service", **options)
            return InferenceCase(lambda name, *args, **kwargs: _method(client, name)(*args, **kwargs), requests)
        awaited = AsyncClient("http://service", **options)
        return InferenceCase(
            lambda name, *args, **kwargs: asyncio.run(_method(awaited, name)(*args, **kwargs)), requests
        )

    return connected


Connect = Callable[[Respond], InferenceCase]


def _method(client: Any, name: str) -> Any:
    for part in name.split("."):
        client = getattr(client, part)
    return client


def service_with(*offered: str) -> Respond:
    """Return a response function for a service that offers these media types, besides JSON, for embeddings."""

    def respond(request: httpx.Request) -> httpx.Response:
        parsed = EncodeRequest.model_validate_json(request.content)
        names = ("embedding", "tokens") if parsed.tokens == "patch" else ("embedding",)
        items = [{name: item[name] for name in names} for item in ITEMS]
        media_type = negotiate_media_type(request.headers["Accept"], offered)
        content = arrow_stream(items) if media_type == ARROW else None
        reply = render_reply(
            EncoderReply("first", items, content, 0), InferenceRequest([], parsed, single=False), media_type
        )
        return httpx.Response(200, headers=dict(reply.headers), content=bytes(reply.body))

    return respond


def arrow_stream(items: list[dict[str, Any]]) -> bytes:
    rows = [{name: array.tolist() for name, array in item.items()} for item in items]
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("offered", "tokens", "transferred"),
    [
        ((ARROW, NUMPY), "none", NUMPY),
        ((ARROW, NUMPY), "patch", ARROW),
        ((), "none", "application/json"),
        ((), "patch", "application/json"),
    ],
)
def test_embeddings_are_identical_in_every_media_type(
    connect: Connect, offered: tuple[str, ...], tokens: str, transferred: str
) -> None:
    received: list[str] = []
    respond = service_with(*offered)

    def record(request: httpx.Request) -> httpx.Response:
        response = respond(request)
        received.append(response.headers["Content-Type"])
        assert response.headers[ENCODER] == "first"
        return response

    found = connect(record).call("embeddings", "first", [b"a", b"b", b"c"], tokens=tokens)
    expected = [{**view, "tokens": None} for view in VIEWS] if tokens == "none" else VIEWS
    assert [view.model_dump() for view in found] == expected
    assert received == [transferred]


def test_base64_embeddings_remain_text(connect: Connect) -> None:
    (first, *_) = connect(service_with(ARROW, NUMPY)).call("embeddings", "first", [b"a"], encoding_format="base64")
    assert isinstance(first.embedding, str)


INFERENCE = [
    ("embeddings", ("first", [b"a"])),
    ("classifications", ("first", [b"a"])),
    ("reconstructions", ("first", [b"a"])),
    ("jobs.neighbours", ("job",)),
]


def no_response(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("timed out", request=request)


@pytest.mark.parametrize(("method", "args"), INFERENCE)
def test_inference_is_not_retried_after_a_timeout(connect: Connect, method: str, args: tuple[Any, ...]) -> None:
    case = connect(no_response)
    with pytest.raises(NoAnswer, match=r"http://service: no response within 70 s; the service may still be working"):
        case.call(method, *args)
    assert len(case.requests) == 1


@pytest.mark.parametrize(("method", "args"), INFERENCE)
def test_inference_is_not_retried_after_its_deadline(connect: Connect, method: str, args: tuple[Any, ...]) -> None:
    case = connect(lambda _: httpx.Response(504))
    with pytest.raises(ApiError):
        case.call(method, *args)
    assert len(case.requests) == 1


@pytest.mark.parametrize(("method", "args"), INFERENCE)
def test_inference_is_retried_after_a_dropped_connection(connect: Connect, method: str, args: tuple[Any, ...]) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("disconnected", request=request)

    case = connect(respond)
    with pytest.raises(NoAnswer):
        case.call(method, *args)
    assert len(case.requests) == QUICK.tries


def test_other_requests_are_retried_after_a_timeout(connect: Connect) -> None:
    case = connect(no_response)
    with pytest.raises(NoAnswer):
        case.call("jobs.get", "job")
    assert len(case.requests) == QUICK.tries


@pytest.mark.parametrize("method", ["embeddings", "classifications", "reconstructions"])
def test_the_client_waits_slightly_longer_than_a_requests_deadline(connect: Connect, method: str) -> None:
    body = {"encoder": "first", "data": []}
    case = connect(lambda _: httpx.Response(200, json=body))
    for deadline_s, options in ((DEADLINE_S, {}), (300.0, {"deadline_s": 300.0})):
        assert case.call(method, "first", [b"a"], **options) == []
        sent, timeout = json.loads(case.requests[-1].content), case.requests[-1].extensions["timeout"]
        assert sent["deadline_s"] == deadline_s
        assert deadline_s + MARGIN_S < timeout["read"] <= deadline_s + 3 * MARGIN_S
        assert timeout["connect"] < DEADLINE_S
