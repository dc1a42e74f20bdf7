"""Tests for the comparison of encoders, over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from tests.support.encoders.encoder_cards import publish, score
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.server import serving


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


@pytest.fixture
def scan(sqlite_engine: Engine, root: str) -> Callable[[], None]:
    return lambda: EncoderDiscovery(EncoderStore(sqlite_engine), root).scan()


@pytest.fixture
def client(sqlite_engine: Engine, tmp_path: Path) -> Iterator[httpx.Client]:
    with serving(sqlite_engine, tmp_path, FakeCluster(cpus=0.0)) as server, server.http_client() as client:
        yield client


def test_two_encoders_are_compared(client: httpx.Client, root: str, scan: Callable[[], None]) -> None:
    decoder = {"network": {}, "mask_strategy": "random", "mask_ratio": 0.75, "pixels": "per_patch"}
    teacher = {"preset": "demo-image-teacher", "weights": None}
    scores = [score("knn", 70.0), score("linear", 80.0)]
    publish(root, "a", teacher=teacher, scores=scores, decoder={**decoder, "sha256": "a"})
    config = {"mask": {"teacher_ratio": 0.75}, "seed": 0}
    facts: dict[str, Any] = {"encoder": {"size": "demo-teacher"}, "config": config, "scores": [score("knn", 75.0)]}
    publish(root, "b", **facts, decoder={**decoder, "mask_ratio": 0.9, "sha256": "b"})
    scan()
    view = client.get("/encoders/a/compare/b").json()
    assert (view["a"]["id"], view["b"]["id"]) == ("a", "b")
    figures = {figure["name"]: (figure["a"], figure["b"]) for figure in view["figures"]}
    assert figures["width"] == (64, 128)
    assert figures["parameters"][0] < figures["parameters"][1]
    pairs = {(pair["protocol"], pair["metric"]): (pair["a"], pair["b"]) for pair in view["scores"]}
    assert pairs == {("knn", "eval/top1"): (70.0, 75.0), ("linear", "eval/top1"): (80.0, None)}
    differing = {difference["field"]: (difference["a"], difference["b"]) for difference in view["differences"]}
    assert differing["config.mask.teacher_ratio"] == (0.5, 0.75)
    assert differing["decoder.mask_ratio"] == (0.75, 0.9)
    assert differing["teacher.preset"] == ("demo-image-teacher", None)
    assert not {"config.seed", "decoder.sha256", "teacher", "teacher.weights"} & differing.keys()
    assert client.get("/encoders/a").json()["rebuilds"]
    assert client.get("/encoders/a/compare/a").json()["differences"] == []


def test_several_encoders_are_compared_with_the_first(
    client: httpx.Client, root: str, scan: Callable[[], None]
) -> None:
    for name, value, loss in (("a", 70.0, 0.5), ("b", 75.0, 0.25), ("c", 75.0, 0.25)):
        config = {"mask": {"teacher_ratio": value / 100}, "seed": 0, "teacher": {"preset": name}}
        scores = [score("knn", value), score("test", loss, "eval/loss"), score("test", value, "eval/unreadable")]
        publish(root, name, config=config, teacher={"preset": name}, scores=scores)
    publish(root, "d", config={"seed": 0})
    scan()
    client.put("/encoders/aliases/production", json={"encoder": "c"})
    view = client.get("/encoders/a/compare", params={"other": ["b", "production", "d"]}).json()
    assert [encoder["id"] for encoder in view["encoders"]] == ["a", "b", "c", "d"]
    found = {(row["protocol"], row["metric"]): (row["values"], row["best"]) for row in view["scores"]}
    assert found == {
        ("knn", "eval/top1"): ([70.0, 75.0, 75.0, None], [1, 2]),
        ("test", "eval/loss"): ([0.5, 0.25, 0.25, None], [1, 2]),
        ("test", "eval/unreadable"): ([70.0, 75.0, 75.0, None], []),
    }
    assert {row["name"]: row["values"] for row in view["figures"]}["width"] == [64, 64, 64, 64]
    differences = {row["field"]: row["values"] for row in view["differences"]}
    assert differences == {
        "config.mask.teacher_ratio": [0.7, 0.75, 0.75, None],
        "config.teacher.preset": ["a", "b", "c", None],
    }
    pair = client.get("/encoders/a/compare/b").json()
    assert [row["field"] for row in pair["differences"]] == list(differences)
    assert client.get("/encoders/a/compare", params={"other": ["b"] * 6}).status_code == 422
    assert client.get("/encoders/a/compare").status_code == 422
