"""Tests for stream limits: the number per key, the lifetime, and ending when a key or token becomes invalid."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from sqlalchemy import Engine

from service.auth import stream_limits
from service.auth.authentication import Principal
from service.auth.stream_limits import RECONNECT, LimitedStream, StreamLimits
from service.client import Client
from service.jobs.store import JobStore
from tests.support.service.apps import key_to
from tests.support.service.control_plane import wait_for
from tests.support.service.failing_server import QUICK
from tests.support.service.fake_cluster import FakeCluster, queued
from tests.support.service.server import Server, serving

MAX_STREAMS = 3


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> dict[str, Any]:
    return getattr(request, "param", {})


@pytest.fixture
def server(
    sqlite_engine: Engine, tmp_path: Path, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    monkeypatch.setattr(stream_limits, "CHECK_S", 0.02)
    with serving(sqlite_engine, tmp_path, FakeCluster(cpus=0.0), max_streams=MAX_STREAMS, **limits) as server:
        yield server


@pytest.fixture
def store(server: Server) -> JobStore:
    store: JobStore = server.app.state.jobs
    return store


def paths(store: JobStore) -> list[str]:
    """Return the paths of two streams that do not end on their own."""
    return [f"/jobs/{queued(store).id}/events", f"/jobs/{queued(store, state='starting', attempt=1).id}/logs?follow=1"]


def client_of(server: Server, header: dict[str, str]) -> httpx.Client:
    return httpx.Client(base_url=f"{server.url}/v1", headers=header, timeout=60)


@pytest.mark.parametrize("kind", [0, 1], ids=["events", "log"])
def test_a_stream_ends_when_its_key_is_revoked(server: Server, store: JobStore, kind: int) -> None:
    path = paths(store)[kind]
    own, other = (key_to(store.engine, "read") for _ in range(2))
    with client_of(server, own) as client, client_of(server, other) as unaffected, ExitStack() as stack:
        stream = stack.enter_context(client.stream("GET", path))
        lasting = stack.enter_context(unaffected.stream("GET", path))
        admin = {"Authorization": f"Bearer {server.key}"}
        key_id = own["Authorization"].split("_")[1]
        assert httpx.delete(f"{server.url}/v1/keys/{key_id}", headers=admin).status_code == 204
        assert stream.read().decode().endswith(RECONNECT)
        assert client.get(path).status_code == 401
        assert len(server.app.state.stream_limits._open) == 1, "the stream of the other key stays open"
        assert lasting.status_code == 200


@pytest.mark.parametrize("remaining_s", [-1.0, 0.05])
def test_a_stream_ends_when_its_key_or_token_expires(remaining_s: float) -> None:
    sent = list[Any]()

    async def events() -> AsyncIterator[str]:
        while True:
            yield ": keep-alive\n\n"
            await asyncio.sleep(3600)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    caller = Principal("oidc:me", None, frozenset(), time.time() + remaining_s)
    limits = StreamLimits(cast(Any, None), 1, 3600.0)

    async def respond() -> None:
        await LimitedStream(events(), caller, limits)({"type": "http"}, receive, send)

    asyncio.run(respond())
    assert (sent[0]["status"], sent[-1]) == (
        200,
        {"type": "http.response.body", "body": RECONNECT.encode(), "more_body": False},
    )
    assert limits._open == {}


@pytest.mark.parametrize("limits", [{"stream_lifetime_s": 0.2}], indirect=True)
def test_a_stream_ends_after_its_lifetime_and_can_be_resumed(server: Server, store: JobStore) -> None:
    path = paths(store)[0]
    with client_of(server, key_to(store.engine, "read")) as client:
        assert client.get(path).text.endswith(RECONNECT)
        resumed = client.get(path, headers={"Last-Event-ID": "1"}).text
        assert "event: job" not in resumed
        assert resumed.endswith(RECONNECT)


@pytest.mark.parametrize("limits", [{"stream_lifetime_s": 0.2}], indirect=True)
def test_a_client_follows_a_silent_job_across_more_streams_than_its_retry_limit(
    server: Server, store: JobStore
) -> None:
    job, opened = queued(store), list[httpx.Response]()

    def end_the_job_at_last(response: httpx.Response) -> None:
        opened.append(response)
        if len(opened) == QUICK.tries + 2:
            store.change(store.get(job.id), "cancelled", state="cancelled")

    with Client(server.url, server.key, patience=QUICK) as client:
        client._http.event_hooks = {"response": [end_the_job_at_last]}
        assert [event.type for event in client.jobs.events(job.id)] == ["created", "cancelled"]
    assert len(opened) > QUICK.tries


def test_the_number_of_concurrent_streams_per_key_is_limited(server: Server, store: JobStore) -> None:
    events, log = paths(store)
    own = key_to(store.engine, "read")
    with client_of(server, own) as client, ExitStack() as stack:
        opened = [stack.enter_context(client.stream("GET", path)) for path in (events, log, events)]
        rejected = client.get(events)
        assert (rejected.status_code, rejected.json()["code"]) == (429, "rate_limited")
        assert "3 open event and log streams, and the maximum is 3" in rejected.json()["detail"]
        assert int(rejected.headers["retry-after"]) >= 1
        assert client.get("/jobs").status_code == 200, "other requests are not limited"
        with client_of(server, key_to(store.engine, "read")) as other, other.stream("GET", events) as theirs:
            assert theirs.status_code == 200
        opened[0].close()

        def is_admitted() -> bool:
            with client.stream("GET", events) as response:
                return response.status_code == 200

        wait_for(is_admitted)
    wait_for(lambda: not server.app.state.stream_limits._open)
