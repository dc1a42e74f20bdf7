"""Fixtures for client tests: both clients, connected to a service that fails on request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from service.client import AsyncClient, Client
from tests.support.service.failing_server import QUICK, ClientCase, FailingServer
from tests.support.service.server import serve_app


@pytest.fixture
def server() -> FailingServer:
    return FailingServer()


@pytest.fixture
def url(server: FailingServer) -> Iterator[str]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["transport"] = getattr(getattr(send, "__self__", None), "transport", None)
        await server.app(scope, receive, send)

    with serve_app(app, http="h11") as address:
        yield address


@pytest.fixture(params=["blocking", "async"])
def client_case(request: pytest.FixtureRequest, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClientCase]:
    """Return each client in turn; the tests must pass for both."""
    for variant in ("_sync", "_async"):
        monkeypatch.setattr(f"service.client.{variant}.jobs.POLL_INTERVAL_S", 0.0)
    QUICK.requested_s.clear()
    if request.param == "blocking":
        with Client(url, "amd_key", patience=QUICK) as client:
            yield ClientCase(client, lambda call: list(call) if isinstance(call, Iterator) else call)
        return

    async def complete(call: Any) -> Any:
        return [item async for item in call] if isinstance(call, AsyncIterator) else await call

    with asyncio.Runner() as runner:
        async_client = AsyncClient(url, "amd_key", patience=QUICK)
        yield ClientCase(async_client, lambda call: runner.run(complete(call)))
        runner.run(async_client.close())
