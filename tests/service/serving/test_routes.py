"""Tests for the deployment routes: concurrent changes, conditional changes and validation, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster

URL = "/v1/deployments/one"


@pytest.fixture
def client(engine: Engine, tmp_path: Path) -> Iterator[TestClient]:
    """Return a client that has an admin key and calls a service with the encoders `a` and `b`."""
    for encoder in ("a", "b"):
        index_encoder(engine, encoder)
    app = create_app(
        Settings(storage=str(tmp_path), data_dir=tmp_path), engine=engine, cluster=FakeCluster(cpus=16.0, gpus=4.0)
    )
    with TestClient(app, headers=key_to(engine, "admin"), raise_server_exceptions=False) as client:
        yield client


def at_once(requests: int, send: Any) -> list[httpx.Response]:
    with ThreadPoolExecutor(requests) as pool:
        return list(pool.map(send, range(requests)))


def test_concurrent_puts_create_one_deployment_and_apply_every_change(client: TestClient) -> None:
    for number in range(5):
        url = f"/v1/deployments/d{number}"
        responses = at_once(8, lambda n, url=url: client.put(url, json={"encoder": "ab"[n % 2]}))
        assert Counter(response.status_code for response in responses) == {202: 8}
        assert sum("location" in response.headers for response in responses) == 1
        assert len({response.headers["etag"] for response in responses}) == 8, "each change must have its own ETag"


def test_concurrent_puts_and_deletes_never_fail_with_an_internal_error(client: TestClient) -> None:
    def send(number: int) -> httpx.Response:
        return client.delete(URL) if number % 3 == 0 else client.put(URL, json={"encoder": "a"})

    for _ in range(5):
        assert {response.status_code for response in at_once(9, send)} <= {202, 204, 404}


def test_only_one_of_several_concurrent_changes_to_a_version_succeeds(client: TestClient) -> None:
    tag = client.put(URL, json={"encoder": "a"}).headers["etag"]
    responses = at_once(8, lambda n: client.put(URL, json={"encoder": "b"}, headers={"If-Match": tag}))
    assert Counter(response.status_code for response in responses) == {202: 1, 412: 7}
    problem = next(response for response in responses if response.status_code == 412).json()
    assert (problem["code"], problem["current"]) == ("precondition_failed", client.get(URL).headers["etag"])


def test_an_outdated_tag_prevents_changes_and_deletions(
    client: TestClient,
) -> None:
    assert client.put(URL, json={"encoder": "a"}, headers={"If-Match": "*"}).status_code == 412
    first = client.put(URL, json={"encoder": "a"})
    got = client.get(URL)
    assert first.headers["etag"] == got.headers["etag"] == got.json()["etag"]
    second = client.put(URL, json={"encoder": "b"}, headers={"If-Match": first.headers["etag"]})
    assert second.status_code == 202
    outdated = {"If-Match": first.headers["etag"]}
    assert client.put(URL, json={"encoder": "a"}, headers=outdated).status_code == 412
    assert client.delete(URL, headers=outdated).status_code == 412
    assert client.get(URL).json()["encoder"] == "b"
    assert client.delete(URL, headers={"If-Match": second.headers["etag"]}).status_code == 204
    client.put(URL, json={"encoder": "a"})
    assert client.delete(URL, headers=outdated).status_code == 412, "a new deployment has a different tag"


INFEASIBLE: list[tuple[dict[str, Any], str, str]] = [
    ({"replicas": {"min": 3, "max": 1}}, "#/replicas", "replicas.min=3 must not be above replicas.max=1"),
    ({"replicas": {"min": 2}}, "#/replicas", "raise max or lower min"),
    ({"gpus": 1.5}, "#/gpus", "gpus=1.5 must be a whole number if above 1"),
    ({"gpus": 1e-6}, "#/gpus", "gpus=1e-06 must be 0 or at least 0.01"),
    ({"cpus": 0.001}, "#/cpus", "cpus=0.001 must be 0 or at least 0.01"),
    ({"share": 1.5}, "#/share", "less than or equal to 1"),
    (
        {"max_batch_tokens": 4096, "max_queued_tokens": 4095},
        *("#/max_queued_tokens", "max_queued_tokens=4095 must not be below max_batch_tokens=4096"),
    ),
    ({"max_batch_tokens": 10**30}, "#/max_batch_tokens", "less than or equal to"),
]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_error_for_invalid_settings_states_the_rule(client: TestClient) -> None:
    for settings, pointer, rule in INFEASIBLE:
        response = client.put(URL, json={"encoder": "a", **settings})
        assert (response.status_code, response.json()["code"]) == (422, "request_invalid"), settings
        (error,) = response.json()["errors"]
        assert (error["pointer"], rule in error["detail"]) == (pointer, True), error
    feasible = {"replicas": {"min": 0, "max": 3}, "gpus": 0.5, "cpus": 2.5, "max_queued_tokens": 4096}
    assert client.put(URL, json={"encoder": "a", **feasible}).status_code == 202
    assert client.put(URL, json={"encoder": "a", "gpus": 2}).status_code == 202
