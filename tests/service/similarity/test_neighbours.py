"""Tests that nearest-neighbour search matches plain NumPy, and that routes, clients and the command agree."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from amd.downstream.embedding.files import EmbeddingIndex, SpanFile, plan_spans, read_rows, write_index, write_rows
from service.client import ApiError, AsyncClient, Client
from service.jobs.execution.protocol import JobFolder
from service.jobs.store import JobStore
from service.serving.deployments import new_deployment
from service.serving.protocol import CANDIDATE, MAIN, pack, unpack
from service.serving.schemas import ServingSettings
from service.similarity.neighbours import EmbeddingCache, nearest, query_by_location, query_by_record, query_by_vector
from service.web.errors import Refusal
from tests.support.service.apps import key_to
from tests.support.service.command import amd as run_command
from tests.support.service.fake_cluster import FakeCluster, queued
from tests.support.service.server import Server, serving

UNREADABLE = 3  # index of the record that could not be read


def location_of(record: int) -> str:
    return f"/data/{'ab'[record % 2]}/{record}.png"


def write_embeddings(output: str, vectors: np.ndarray[Any, Any], rows_per_file: int = 4) -> EmbeddingIndex:
    """Write the output of an embed job, in which record UNREADABLE has no row."""
    files = []
    for span in plan_spans(len(vectors), rows_per_file):
        records = np.array([record for record in span if record != UNREADABLE], np.int64)
        labels = np.where(records % 2 == 0, records, -1)
        write_rows(output, span, vectors[records].astype(np.float32), records, labels, list(map(location_of, records)))
        files.append(SpanFile(start=span.start, stop=span.stop, rows=len(records), file="x.parquet"))
    bad = {"record": UNREADABLE, "location": location_of(UNREADABLE), "reason": "is not an image"}
    index = EmbeddingIndex(
        encoder="small",
        sha256="abc",
        data="/data",
        digest="def",
        samples=len(vectors),
        count=len(vectors) - 1,
        width=vectors.shape[1],
        normalize=False,
        bad=(bad,),
        files=tuple(files),
        made_of={},
    )
    write_index(output, index)
    return index


def nearest_records(vectors: np.ndarray[Any, Any], vector: np.ndarray[Any, Any], k: int, *excluded: int) -> list[int]:
    """Return record indices in descending order of cosine similarity, computed in float64."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector)
    scores = vectors @ vector / np.where(lengths > 0, lengths, 1)
    scores[[UNREADABLE, *excluded]] = -np.inf
    return np.argsort(-scores, kind="stable")[: min(k, len(vectors) - 1 - len(excluded))].tolist()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(5, 60),
    width=st.integers(4, 16),
    rows_per_file=st.integers(1, 70),
    k=st.integers(1, 100),
    by=st.sampled_from(["vector", "record", "location"]),
    limit=st.sampled_from([0, 500, 2**20]),
)
def test_neighbours_match_plain_numpy(
    seed: int, count: int, width: int, rows_per_file: int, k: int, by: str, limit: int
) -> None:
    noise = np.random.default_rng(seed)
    vectors = noise.normal(size=(count, width))
    with tempfile.TemporaryDirectory() as output:
        index, cache = write_embeddings(output, vectors, rows_per_file), EmbeddingCache(limit)
        record = int(noise.integers(4, count))
        vector = noise.normal(size=width) * 1e3
        query = {
            "vector": lambda: query_by_vector(index, vector.tolist()),
            "record": lambda: query_by_record(cache, output, index, record),
            "location": lambda: query_by_location(cache, output, index, location_of(record)),
        }[by]()
        found = nearest(cache.rows(output, (file.span for file in index.files)), query, k)
        expected = (
            nearest_records(vectors, vector, k)
            if by == "vector"
            else nearest_records(vectors, vectors[record], k, record)
        )
        assert [each.record for each in found] == expected
        assert [each.location for each in found] == list(map(location_of, expected))
        assert [each.label for each in found] == [record if record % 2 == 0 else None for record in expected]
        assert cache.cached_bytes <= limit


def test_the_cache_evicts_the_least_recently_used_set_at_its_limit(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 8))
    outputs = [str(tmp_path / name) for name in "abc"]
    indexes = [write_embeddings(output, vectors) for output in outputs]
    spans = [file.span for file in indexes[0].files]
    one = sum(read_rows(outputs[0], span).nbytes for span in spans)
    cache = EmbeddingCache(2 * one)
    for output in (*outputs, outputs[0]):
        assert sum(len(rows.records) for rows in cache.rows(output, spans)) == 39
        assert cache.cached_bytes <= 2 * one
    assert set(cache._sets) == {outputs[2], outputs[0]}
    small = EmbeddingCache(one // 2)  # a set larger than the cache is partially cached
    for _ in range(2):
        assert sum(len(rows.records) for rows in small.rows(outputs[0], spans)) == 39
    assert one // 4 < small.cached_bytes <= one // 2


def test_invalid_queries_are_rejected_with_a_reason(tmp_path: Path) -> None:
    output, cache = str(tmp_path), EmbeddingCache()
    index = write_embeddings(output, np.eye(8))
    for values, reason in (([1.0], "the vector has"), ([0.0] * 8, "the vector is zero")):
        with pytest.raises(Refusal, match=reason) as refused:
            query_by_vector(index, values)
        assert refused.value.code == "not_possible"
    with pytest.raises(Refusal, match="record 3 could not be read"):
        query_by_record(cache, output, index, UNREADABLE)
    with pytest.raises(Refusal, match="records 0 to 7"):
        query_by_record(cache, output, index, 8)
    with pytest.raises(Refusal, match="could not be read"):
        query_by_location(cache, output, index, location_of(UNREADABLE))
    for location in ("/data/a/4.pn", "data/a/4.png", "/nowhere"):
        with pytest.raises(Refusal, match="not in this set"):
            query_by_location(cache, output, index, location)
    np.testing.assert_allclose(np.linalg.norm(query_by_vector(index, [1e300] * 8).vector), 1, atol=1e-6)


class SimilarityService:
    """A control plane with an embed job that has succeeded."""

    def __init__(self, server: Server, engine: Engine, root: str) -> None:
        self.server, self.engine, self.store = server, engine, JobStore(engine)
        self.vectors = np.random.default_rng(1).normal(size=(20, 6))
        self.job = self.add("embed", "succeeded")
        write_embeddings(JobFolder(root, self.job).output, self.vectors)

    def add(self, kind: str, state: str) -> str:
        now = time.time()
        ended = {"ended_at": now} if state == "succeeded" else {}
        return queued(self.store, kind=kind, state=state, attempt=1, started_at=now, **ended).id

    def search(self, body: Any, job: str | None = None, key: dict[str, str] | None = None) -> httpx.Response:
        headers = key or {"Authorization": f"Bearer {self.server.key}"}
        return httpx.post(f"{self.server.url}/v1/jobs/{job or self.job}/neighbours", json=body, headers=headers)

    def deploy(self, monkeypatch: pytest.MonkeyPatch, serving: dict[str, str], vector: Any) -> list[dict[str, Any]]:
        """Create a deployment whose replicas return `vector`, and return the list of calls they receive."""
        defaults: dict[str, Any] = {"candidate": None, "share": 1.0, "settings": ServingSettings()}
        store, gateway = self.server.app.state.deployments, self.server.app.state.gateway
        deployment, _ = store.put(new_deployment("images", "default", "test", encoder=serving[MAIN], **defaults))
        store.record_status(deployment, "healthy", "", serving)
        calls: list[dict[str, Any]] = []

        async def exchange(method: str, name: str, body: bytes, seconds: float) -> httpx.Response:
            calls.append(unpack(body))
            reply = {"encoder": serving[calls[-1]["slot"]], "items": [{"embedding": vector}]}
            return httpx.Response(200, content=pack(reply))

        monkeypatch.setattr(gateway, "_exchange", exchange)
        gateway._lookups.forget(lambda *_: True)
        return calls


@pytest.fixture
def service(sqlite_engine: Engine, tmp_path: Path) -> Iterator[SimilarityService]:
    with serving(sqlite_engine, tmp_path, FakeCluster(cpus=0.0)) as server:
        yield SimilarityService(server, sqlite_engine, str(tmp_path / "root"))


def test_neighbours_are_found_by_record_location_and_vector(service: SimilarityService) -> None:
    expected = nearest_records(service.vectors, service.vectors[5], 4, 5)
    for body in ({"record": 5}, {"location": location_of(5)}):
        found = service.search({**body, "k": 4}).json()
        assert [each["record"] for each in found] == expected
        assert [each["location"] for each in found] == list(map(location_of, expected))
        assert found[0].keys() == {"record", "location", "label", "score"}
    found = service.search({"vector": service.vectors[5].tolist()}).json()
    assert len(found) == 10
    assert found[0]["record"] == 5
    assert found[0]["score"] == pytest.approx(1, abs=1e-6)


def test_a_file_is_embedded_only_by_a_deployment_of_the_same_encoder(
    service: SimilarityService, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"input": {"base64": "AAAA"}, "k": 3}
    response = service.search(body)
    assert (response.status_code, response.json()["code"]) == (409, "encoder_not_deployed")
    calls = service.deploy(monkeypatch, {MAIN: "small", CANDIDATE: "other"}, service.vectors[8].astype(np.float32))
    response = service.search(body)
    assert response.status_code == 200, response.text
    assert [each["record"] for each in response.json()] == nearest_records(service.vectors, service.vectors[8], 3)
    assert (calls[0]["slot"], calls[0]["items"]) == (MAIN, [{"content": b"\0\0\0"}])
    service.deploy(monkeypatch, {MAIN: "other"}, service.vectors[8].astype(np.float32))
    assert service.search(body).json()["code"] == "encoder_not_deployed"
    assert service.search({"input": "/etc/passwd"}).json()["code"] == "uri_not_allowed"


def test_each_invalid_request_returns_an_error_code(service: SimilarityService) -> None:
    invalid = [
        *({}, {"k": 3}, {"record": 1, "location": "x"}, {"record": -1}, {"record": 1, "k": 101}, {"record": 1, "k": 0}),
        *({"vector": []}, {"vector": ["a"]}, {"location": ""}, {"input": {"base64": "?"}}, {"records": 1}),
    ]
    for body in invalid:
        response = service.search(body)
        assert (response.status_code, response.json()["code"]) == (422, "request_invalid"), body
    for body in ({"record": UNREADABLE}, {"record": 99}, {"location": "x"}, {"vector": [1.0]}, {"vector": [0.0] * 6}):
        response = service.search(body)
        assert (response.status_code, response.json()["code"]) == (422, "not_possible"), body
    for kind, state, code in (("train", "succeeded", "not_possible"), ("embed", "running", "illegal_action")):
        assert service.search({"record": 0}, service.add(kind, state)).json()["code"] == code
    without_files = service.add("embed", "succeeded")
    assert service.search({"record": 0}, without_files).json()["code"] == "not_possible"
    assert service.search({"record": 0}, "embed-never").status_code == 404
    assert service.search({"record": 0}, key=key_to(service.engine, "read", project="theirs")).status_code == 404


def test_the_clients_and_the_command_return_the_same_neighbours(
    service: SimilarityService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = nearest_records(service.vectors, service.vectors[5], 4, 5)
    with Client(service.server.url, service.server.key) as client:
        found = client.jobs.neighbours(service.job, record=5, k=4)
        assert [each.record for each in found] == expected
        picture = tmp_path / "a.png"
        picture.write_bytes(b"picture")
        with pytest.raises(ApiError, match="no deployment serves 'small'"):
            client.jobs.neighbours(service.job, file=picture)

    async def search_async() -> list[int]:
        client = AsyncClient(service.server.url, service.server.key)
        found = await client.jobs.neighbours(service.job, location=location_of(5), k=4)
        await client.close()
        return [each.record for each in found]

    assert asyncio.run(search_async()) == expected
    monkeypatch.setenv("AMD_URL", service.server.url)
    monkeypatch.setenv("AMD_KEY", service.server.key)
    code, out, _ = run_command(
        monkeypatch, capfd, "jobs", "neighbours", service.job, "--record", "5", "-k", "4", "--json"
    )
    assert code == 0
    assert [each["record"] for each in json.loads(out)] == expected
    code, out, _ = run_command(monkeypatch, capfd, "jobs", "neighbours", service.job, "--location", location_of(5))
    assert code == 0
    assert location_of(expected[0]) in out
    for args in ((), ("--record", "5", "--location", "x"), ("--file", "nowhere.png")):
        code, _, err = run_command(monkeypatch, capfd, "jobs", "neighbours", service.job, *args)
        assert code == 2, err
