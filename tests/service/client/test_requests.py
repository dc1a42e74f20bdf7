"""Tests for requests and retries through both clients, and for how the clients find the service."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import ApiError, AsyncClient, Client, DeploymentRequest, JobRequest, NoAnswer, Patience
from tests.support.service.failing_server import QUICK, ClientCase, FailingServer

REQUEST = JobRequest(kind="train", preset="demo-image-amd")


def test_a_rejected_or_lost_submission_is_retried_with_the_same_key(
    server: FailingServer, client_case: ClientCase
) -> None:
    server.faults = [503, "break", 429]
    assert client_case.resolve(client_case.client.jobs.submit(REQUEST)).id == "new"
    keys = {request.headers["idempotency-key"] for request in server.requests}
    assert (len(server.requests), len(keys)) == (4, 1)
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer amd_key"}
    client_case.resolve(client_case.client.jobs.submit(REQUEST))
    assert server.requests[-1].headers["idempotency-key"] not in keys


def test_retry_after_is_respected(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [429, 503]
    client_case.resolve(client_case.client.jobs.get("a"))
    assert QUICK.requested_s == [7.0, 7.0]


def test_exhausted_retries_raise_the_services_error(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [503] * 9
    with pytest.raises(ApiError) as rejected:
        client_case.resolve(client_case.client.jobs.get("a"))
    assert (rejected.value.problem.status, rejected.value.problem.code, len(server.requests)) == (503, "busy", 4)


def test_a_request_that_may_have_been_executed_is_not_retried(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = ["break"]
    with pytest.raises(NoAnswer):
        client_case.resolve(client_case.client.jobs.retry("a"))
    assert len(server.requests) == 1
    server.faults = ["break"]
    assert (
        client_case.resolve(client_case.client.jobs.cancel("a")).message == "cancel"
    )  # cancelling twice has no further effect
    assert len(server.requests) == 3


def test_a_conditional_change_that_may_have_been_made_is_not_retried(
    server: FailingServer, client_case: ClientCase
) -> None:
    deployments, request = client_case.client.deployments, DeploymentRequest(encoder="e")
    for change, argument in ((deployments.put, request), (deployments.rollback, 1)):
        for etag, sent in ((None, 2), ('"1-a"', 1)):
            server.requests.clear()
            server.faults = ["break", 404]
            with pytest.raises(ApiError if etag is None else NoAnswer):
                client_case.resolve(change("a", argument, etag))
            assert len(server.requests) == sent
            assert server.requests[0].headers.get("if-match") == etag


def test_a_rate_limited_request_is_retried(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [429]
    assert client_case.resolve(client_case.client.jobs.retry("a")).message == "retry"


def test_a_client_error_is_not_retried(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [404]
    with pytest.raises(ApiError, match=r"not now \(busy\)"):
        client_case.resolve(client_case.client.jobs.get("a"))
    assert len(server.requests) == 1


def test_an_error_page_from_a_proxy_raises_an_api_error(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = ["proxy"]
    with pytest.raises(ApiError) as rejected:
        client_case.resolve(client_case.client.jobs.get("a"))
    assert rejected.value.problem.code == "http_404"


def test_a_listing_reads_all_pages_and_ignores_unknown_fields(server: FailingServer, client_case: ClientCase) -> None:
    found = client_case.resolve(client_case.client.jobs.list(state="queued", labels={"team": "video"}, page=3))
    assert [view.id for view in found] == [f"job-{n}" for n in range(7)]
    assert "state=queued" in server.requests[0].query
    assert "label=team%3Dvideo" in server.requests[0].query
    assert len(server.requests) == 3


def test_wait_returns_when_the_job_ends(server: FailingServer, client_case: ClientCase) -> None:
    server.states = ["queued", "running", "pausing", "failed"]
    assert client_case.resolve(client_case.client.jobs.wait("a")).state == "failed"
    server.states = ["running"]
    with pytest.raises(TimeoutError, match="a is still running"):
        client_case.resolve(client_case.client.jobs.wait("a", timeout_s=-1))


def test_the_error_contains_the_address_of_an_unreachable_service() -> None:
    unreachable = "http://127.0.0.1:1"
    with (
        Client(unreachable, patience=QUICK) as client,
        pytest.raises(NoAnswer, match=f"{unreachable}: the service does not"),
    ):
        client.jobs.get("a")


def test_retry_delays_grow_and_are_jittered() -> None:
    patience = Patience(tries=10, first_s=1.0, most_s=8.0)
    pauses = [[patience.pause(failures) or 0.0 for _ in range(20)] for failures in (1, 2, 3, 4, 9)]
    assert [max(drawn) <= most for drawn, most in zip(pauses, (1, 2, 4, 8, 8), strict=True)] == [True] * 5
    assert all(len(set(drawn)) > 1 for drawn in pauses)
    assert patience.pause(10) is None
    assert patience.pause(1, requested_s=1e6) is None


def test_a_request_is_not_retried_if_retry_after_exceeds_the_limit(
    server: FailingServer, client_case: ClientCase
) -> None:
    client_case.client.jobs._patience = Patience(retry_after_most_s=5.0)
    server.faults = [503, 503]
    with pytest.raises(ApiError, match="not now"):
        client_case.resolve(client_case.client.jobs.get("a"))
    assert len(server.requests) == 1


def test_a_cancelled_request_is_not_retried() -> None:
    requests: list[httpx.Request] = []

    async def respond(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return await asyncio.get_running_loop().create_future()

    async def cancel(call: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(call)
        while not requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(requests) == 1
        requests.clear()

    async def run() -> None:
        async with AsyncClient("http://service", patience=QUICK, transport=httpx.MockTransport(respond)) as client:
            await cancel(client.jobs.get("a"))
            await cancel(anext(client.jobs.events("a")))

    asyncio.run(run())


def test_the_client_reads_service_and_key_from_the_environment(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("amd_from_file\n")
    monkeypatch.setenv("AMD_URL", url)
    monkeypatch.setenv("AMD_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.delenv("AMD_KEY", raising=False)
    with Client.from_environment() as client:
        assert client._http.headers["authorization"] == "Bearer amd_from_file"
        assert client.jobs.get("a").id == "a"
    monkeypatch.setenv("AMD_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(NoAnswer, match=r"AMD_KEY_FILE=.*none"):
        Client.from_environment()


def test_the_error_for_a_missing_service_explains_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AMD_URL", raising=False)
    monkeypatch.setenv("AMD_DATA_DIR", str(tmp_path))
    with pytest.raises(NoAnswer, match="amd up"):
        Client.from_environment()


def test_the_client_imports_neither_torch_nor_ray() -> None:
    code = "import sys, service.client; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
