"""Tests for managing keys and webhooks through both clients, against a real service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from service.client import ApiError, AsyncClient, Client, JobRequest, KeyRequest, ProjectPolicy, WebhookRequest
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.server import Server, serving


@pytest.fixture
def server(sqlite_engine: Engine, tmp_path: Path) -> Iterator[Server]:
    with serving(sqlite_engine, tmp_path, FakeCluster(cpus=0.0)) as server:
        yield server


Resolve = Callable[[Any], Any]


@pytest.fixture(params=["blocking", "async"])
def client_case(request: pytest.FixtureRequest, server: Server) -> Iterator[tuple[Any, Resolve]]:
    """Return each client in turn, with a function that resolves the return value of the client's methods."""
    if request.param == "blocking":
        with Client(server.url, server.key) as client:
            yield client, lambda call: call
        return
    with asyncio.Runner() as runner:
        async_client = AsyncClient(server.url, server.key)
        yield async_client, runner.get_loop().run_until_complete
        runner.run(async_client.close())


def test_a_webhook_is_created_listed_monitored_and_deleted(client_case: tuple[Any, Resolve]) -> None:
    client, resolve = client_case
    created = resolve(client.webhooks.create(WebhookRequest(url="https://hooks.example.com/amd", events=["created"])))
    assert created.secret.startswith("whsec_")
    assert [(found.id, found.events) for found in resolve(client.webhooks.list())] == [(created.id, ["created"])]
    job = resolve(client.jobs.submit(JobRequest(kind="train", preset="demo-image-amd")))
    deliveries = resolve(client.webhooks.deliveries(created.id, limit=1))
    assert [(found.job_id, found.type) for found in deliveries] == [(job.id, "job.created")]
    assert resolve(client.webhooks.redeliver(created.id, deliveries[0].id)).id == deliveries[0].id
    assert resolve(client.webhooks.test(created.id)).type == "ping"
    resolve(client.webhooks.delete(created.id))
    assert resolve(client.webhooks.list()) == []
    with pytest.raises(ApiError, match="not_found"):
        resolve(client.webhooks.deliveries(created.id))
    with pytest.raises(ApiError, match="https://"):
        resolve(client.webhooks.create(WebhookRequest(url="http://hooks.example.com")))


def test_a_key_is_created_listed_and_revoked(client_case: tuple[Any, Resolve], server: Server) -> None:
    client, resolve = client_case
    created = resolve(client.keys.create(KeyRequest(name="reader", scopes=["read"])))
    with Client(server.url, created.key) as reader:
        assert list(reader.jobs.list()) == []
        with pytest.raises(ApiError, match="forbidden"):
            reader.keys.list()
    assert created.id in {key.id for key in resolve(client.keys.list())}
    resolve(client.keys.revoke(created.id))
    with Client(server.url, created.key) as reader, pytest.raises(ApiError, match="unauthenticated"):
        list(reader.jobs.list())


def test_a_project_is_stored_and_read_and_its_changes_are_listed(client_case: tuple[Any, Resolve]) -> None:
    client, resolve = client_case
    stored = resolve(client.projects.put("video", ProjectPolicy(share=2, max_gpus=8)))
    assert (stored.name, stored.share, stored.max_gpus) == ("video", 2.0, 8.0)
    assert resolve(client.projects.get("video")) == stored
    assert resolve(client.projects.list()) == [stored]
    assert resolve(client.projects.usage("job", project="video")).items == []

    async def collected() -> list[Any]:
        return [entry async for entry in client.projects.changes(target="video")]

    changes = client.projects.changes(target="video")
    found = resolve(collected()) if isinstance(changes, AsyncIterator) else list(changes)
    assert [(entry.action, entry.outcome) for entry in found] == [("project.put", "created")]
