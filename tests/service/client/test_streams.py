"""Tests for both clients: event streams, followed logs and downloads survive dropped connections."""

from __future__ import annotations

import asyncio
import json
from itertools import accumulate, pairwise
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import ApiError, AsyncClient, Client, NoAnswer
from tests.support.service.failing_server import LOG, QUICK, ClientCase, FailingServer


def test_an_interrupted_event_stream_neither_loses_nor_repeats_events(
    server: FailingServer, client_case: ClientCase
) -> None:
    events = client_case.resolve(client_case.client.jobs.events("a"))
    assert [event.id for event in events] == list(range(1, 9))
    resumed = [request.headers.get("last-event-id") for request in server.requests]
    assert resumed == [None, "2", "4", "6"]


def test_events_resume_after_a_known_id(client_case: ClientCase) -> None:
    assert [event.id for event in client_case.resolve(client_case.client.jobs.events("a", after=6))] == [7, 8]


def test_a_followed_log_is_complete(client_case: ClientCase) -> None:
    assert "".join(client_case.resolve(client_case.client.jobs.logs("a", follow=True))) == LOG
    assert "".join(client_case.resolve(client_case.client.jobs.logs("a"))) == LOG


def test_a_followed_log_continues_with_the_next_attempt(server: FailingServer, client_case: ClientCase) -> None:
    server.states = ["running", "retrying", "succeeded"]
    assert "".join(client_case.resolve(client_case.client.jobs.logs("a", follow=True))) == LOG * 2
    assert {request.query for request in server.requests if request.query} == {
        "follow=true&attempt=1",
        "follow=true&attempt=2",
    }


def test_the_log_of_an_unstarted_job_is_empty_and_an_attempt_can_be_selected(
    server: FailingServer, client_case: ClientCase
) -> None:
    server.attempt = 0
    assert client_case.resolve(client_case.client.jobs.logs("a", follow=True)) == []
    server.attempt = 2
    assert "".join(client_case.resolve(client_case.client.jobs.logs("a", follow=True, attempt=1))) == LOG
    assert server.requests[-1].query == "follow=true&attempt=1"


def test_a_rejected_stream_raises_the_error(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [503, 404]
    with pytest.raises(ApiError, match="not now"):
        client_case.resolve(client_case.client.jobs.events("a"))


@pytest.mark.parametrize("parts", [True, False], ids=["in parts", "whole only"])
def test_an_interrupted_download_is_resumed(
    server: FailingServer, client_case: ClientCase, tmp_path: Path, parts: bool
) -> None:
    server.parts = parts
    target = tmp_path / "weights"
    assert client_case.resolve(client_case.client.encoders.download("a", target, "encoder.safetensors")) == target
    assert target.read_bytes() == server.file
    assert (len(server.requests), {request.headers.get("if-range") for request in server.requests[1:]}) == (4, {'"1"'})
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_failed_download_leaves_no_file(server: FailingServer, client_case: ClientCase, tmp_path: Path) -> None:
    server.faults = [404]
    with pytest.raises(ApiError):
        client_case.resolve(client_case.client.encoders.download("a", tmp_path / "weights"))
    assert list(tmp_path.iterdir()) == []


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n"), min_size=1)


@given(st.lists(st.tuples(st.integers(0, 99), TEXT), max_size=6), st.lists(st.integers(1, 9)))
def test_events_do_not_depend_on_chunk_boundaries(sent: list[tuple[int, str]], cuts: list[int]) -> None:
    content = b"".join(f": hb\nid: {n}\nevent: log\ndata: {text}\n\n".encode() for n, text in sent)
    bounds = [0, *accumulate(cuts), len(content)]
    chunks = [content[start:end] for start, end in pairwise(bounds)] + [b"event: end\ndata: {}\n\n"]
    headers = {"Content-Type": "text/event-stream"}
    respond = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=iter(chunks)))
    expected = [(str(n), "log", text) for n, text in sent]
    with Client("http://service", transport=respond) as client:
        assert list(client._events(lambda event: (event.id, event.event, event.data), "events")) == expected


def test_a_stream_that_always_ends_early_raises_an_error() -> None:
    requests: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, text=": heartbeat\n\nretry: 1\n\n")

    with (
        Client("http://service", patience=QUICK, transport=httpx.MockTransport(respond)) as client,
        pytest.raises(NoAnswer, match="/v1/jobs/a/events: the stream was interrupted repeatedly"),
    ):
        list(client.jobs.events("a"))
    assert len(requests) == QUICK.tries


def test_reconnecting_on_request_does_not_count_against_the_retry_limit() -> None:
    event = {"id": 1, "at": "2026-01-01T00:00:00Z", "type": "created", "actor": "key", "data": {}}
    streams = [f"id: 1\nevent: job\ndata: {json.dumps(event)}\n\n", *[""] * (2 * QUICK.tries)]
    requests: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        body = f"{streams.pop(0)}event: reconnect\ndata: {{}}\n\n" if streams else "event: end\ndata: {}\n\n"
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, text=body)

    with Client("http://service", patience=QUICK, transport=httpx.MockTransport(respond)) as client:
        assert [event.id for event in client.jobs.events("a")] == [1]
    assert len(requests) == 2 * QUICK.tries + 2
    assert [request.headers.get("last-event-id") for request in requests] == [None, *["1"] * (len(requests) - 1)]


def test_an_abandoned_stream_is_closed_and_the_client_remains_usable(server: FailingServer, url: str) -> None:
    with Client(url, patience=QUICK) as client:
        events = client.jobs.events("a")
        assert next(events).id == 1
        events.close()
        assert client.jobs.get("a").id == "a"
    assert [request.path for request in server.requests] == ["/v1/jobs/a/events", "/v1/jobs/a"]

    async def abandon() -> None:
        async with AsyncClient(url, patience=QUICK) as client:
            chunks = client.jobs.logs("a", follow=True)
            assert LOG.startswith(await anext(chunks))
            await chunks.aclose()
            assert client._http._transport._pool.connections == []  # a response that was not read to its end

    asyncio.run(abandon())
    assert [request.path for request in server.requests[2:]] == ["/v1/jobs/a", "/v1/jobs/a/logs"]
