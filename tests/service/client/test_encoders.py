"""Tests for managing encoders and aliases through both clients and `amd encoders`, against a real service."""

from __future__ import annotations

import asyncio
import inspect
import json
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine

from service.client import ApiError, AsyncClient, Client, DeploymentRequest, ImportRequest
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from tests.support.encoders.encoder_cards import publish, score
from tests.support.service.command import amd as run_command
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.server import Server, serving


@pytest.fixture
def server(sqlite_engine: Engine, tmp_path: Path) -> Iterator[Server]:
    root = str(tmp_path / "root")
    publish(root, "a", scores=[score("knn", 70.0)])
    publish(root, "b", hours=1, weights=b"weights of b", encoder={"size": "demo-teacher"}, scores=[score("knn", 75.0)])
    EncoderDiscovery(EncoderStore(sqlite_engine), root).scan()
    with serving(sqlite_engine, tmp_path, FakeCluster(cpus=0.0)) as server:
        yield server


class EncoderClientCase(NamedTuple):
    client: Any
    resolve: Callable[[Any], Any]
    """Complete a call: return its value, or a list of the items that it yields."""


@pytest.fixture(params=["blocking", "async"])
def client_case(request: pytest.FixtureRequest, server: Server) -> Iterator[EncoderClientCase]:
    if request.param == "blocking":
        with Client(server.url, server.key) as client:
            yield EncoderClientCase(client, lambda call: list(call) if inspect.isgenerator(call) else call)
        return

    async def complete(call: Any) -> Any:
        return [item async for item in call] if isinstance(call, AsyncIterator) else await call

    with asyncio.Runner() as runner:
        async_client = AsyncClient(server.url, server.key)
        yield EncoderClientCase(async_client, lambda call: runner.run(complete(call)))
        runner.run(async_client.close())


def test_encoders_and_aliases_can_be_managed_through_both_clients(
    client_case: EncoderClientCase, tmp_path: Path
) -> None:
    encoders, aliases, resolve = client_case.client.encoders, client_case.client.aliases, client_case.resolve
    assert [encoder.id for encoder in resolve(encoders.list(page=1))] == ["b", "a"]
    assert [encoder.id for encoder in resolve(encoders.list(size="demo-teacher"))] == ["b"]
    assert resolve(aliases.move("production", "a", expected=None)).moves == 1
    with pytest.raises(ApiError, match="alias_moved"):
        resolve(aliases.move("production", "b", expected="b"))
    resolve(aliases.move("production", "b"))
    assert [(move.before, move.after) for move in resolve(aliases.get("production")).history] == [
        (None, "a"),
        ("a", "b"),
    ]
    assert [alias.encoder for alias in resolve(aliases.list())] == ["b"]
    assert resolve(encoders.get("production")).id == "b"
    with pytest.raises(ApiError, match="encoder_in_use"):
        resolve(encoders.delete("b"))
    assert resolve(encoders.compare("a", "production")).b.id == "b"
    several = resolve(encoders.compare_several(["a", "production", "a"]))
    assert [encoder.id for encoder in several.encoders] == ["a", "b", "a"]
    weights = resolve(encoders.download("production", tmp_path / "b.safetensors", "encoder.safetensors"))
    assert weights.read_bytes() == b"weights of b"
    with tarfile.open(resolve(encoders.download("production", tmp_path / "b.tar"))) as tar:
        assert "b/encoder.json" in tar.getnames()
    resolve(aliases.delete("production"))
    resolve(encoders.delete("b"))
    assert [encoder.id for encoder in resolve(encoders.list())] == ["a"]
    job = resolve(encoders.import_(ImportRequest(weights="timm:vit_tiny_patch16_224", license="Apache-2.0")))
    assert (job.kind, job.name) == ("import", "vit_tiny_patch16_224")


def test_a_deployment_can_be_rolled_back_through_both_clients(client_case: EncoderClientCase) -> None:
    deployments, resolve = client_case.client.deployments, client_case.resolve
    for encoder in ("a", "b"):
        etag = resolve(deployments.put("one", DeploymentRequest(encoder=encoder))).etag
    assert [(one.number, one.encoder, one.changed) for one in resolve(deployments.revisions("one"))] == [
        (2, "b", ["encoder"]),
        (1, "a", None),
    ]
    assert resolve(deployments.rollback("one", 1, etag)).encoder == "a"
    assert [one.restored for one in resolve(deployments.revisions("one"))] == [1, None, None]
    with pytest.raises(ApiError, match="precondition_failed"):
        resolve(deployments.rollback("one", 2, etag))


@pytest.fixture
def amd(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    for name, value in {"AMD_URL": server.url, "AMD_KEY": server.key, "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return lambda *args: run_command(monkeypatch, capfd, "encoders", *map(str, args))


def test_the_comparison_prints_missing_values_as_text(amd: Any, server: Server) -> None:
    root, encoders = server.app.state.settings.root, server.app.state.encoders
    publish(root, "licensed", weights_license="Apache-2.0", teacher={"preset": "demo-image-teacher"})
    EncoderDiscovery(encoders, root).scan()
    rows = dict(line.split(maxsplit=1) for line in amd("compare", "a", "licensed")[1].splitlines())
    assert rows["weights_license"].split() == ["not", "stated", "Apache-2.0"]
    assert rows["teacher.preset"].split() == ["–", "demo-image-teacher"]


def test_aliases_and_encoders_can_be_managed_with_the_command(amd: Any, tmp_path: Path) -> None:
    assert amd("aliases")[:2] == (0, "no aliases\n")
    assert amd("alias", "production", "a") == (0, "production: a\n", "")
    code, _, err = amd("alias", "production", "b", "--expected", "b")
    assert (code, "production points to a" in err) == (2, True)
    assert json.loads(amd("alias", "production", "b", "--json")[1])["moves"] == 2
    assert all(text in amd("aliases")[1] for text in ("production", "b", "default"))
    assert [move["after"] for move in json.loads(amd("aliases", "production", "--json")[1])["history"]] == ["a", "b"]
    assert "from" in amd("aliases", "production")[1]
    table = amd("compare", "a", "production")[1]
    assert all(text in table for text in ("parameters", "knn top1, demo:digits", "70.00", "encoder.width", "128"))
    assert json.loads(amd("compare", "a", "b", "--json")[1])["a"]["id"] == "a"
    assert "75.00 (best)" in table
    found = json.loads(amd("compare", "a", "b", "a", "--json")[1])
    assert [encoder["id"] for encoder in found["encoders"]] == ["a", "b", "a"]
    assert amd("download", "production", "--file", "encoder.safetensors")[0] == 0
    assert (tmp_path / "encoder.safetensors").read_bytes() == b"weights of b"
    downloaded = json.loads(amd("download", "a", "--json")[1])
    assert downloaded == {"encoder": "a", "file": "a.tar", "bytes": (tmp_path / "a.tar").stat().st_size}
    code, out, err = amd("compare", "a", "nothing", "--json")
    assert (code, json.loads(out)["code"], "no encoder 'nothing'" in err) == (2, "not_found", True)
