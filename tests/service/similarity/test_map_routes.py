"""Tests for a job's embedding map: content, headers, isolation between projects, and damaged files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine

from amd.downstream.embedding.map_files import MAX_THUMBNAIL_BYTES, map_url, thumbnails_url
from service.jobs.execution.protocol import JobFolder
from service.jobs.store import JobStore
from service.settings import Settings
from service.similarity import map_routes
from service.similarity.neighbours import EmbeddingCache
from tests.support.browser.embedded_digits import HOSTILE, UNREADABLE, add_embedded_digits
from tests.support.service.apps import client_of, key_to
from tests.support.service.fake_cluster import queued

COUNT = 30


class MapService:
    """The map routes, with an embed job that has succeeded."""

    def __init__(self, engine: Engine, root: Path) -> None:
        self.engine, self.store = engine, JobStore(engine)
        self.client = client_of(engine, map_routes.router, settings=Settings(storage=str(root)))
        app: Any = self.client.app
        app.state.jobs = self.store
        app.state.embedding_cache = EmbeddingCache()
        self.job = add_embedded_digits(self.store, str(root), COUNT)
        self.output = Path(JobFolder(str(root), self.job).output)

    def get(self, path: str, job: str | None = None, project: str | None = None, scope: str = "read") -> Any:
        header = key_to(self.engine, scope, project=project)
        return self.client.get(f"/v1/jobs/{job or self.job}/map{path}", headers=header)


@pytest.fixture
def service(sqlite_engine: Engine, tmp_path: Path) -> MapService:
    return MapService(sqlite_engine, tmp_path / "root")


def test_the_map_lists_all_readable_samples(service: MapService) -> None:
    found = service.get("").json()
    assert found["job"] == service.job
    assert (found["encoder"], found["layout"], found["samples"]) == ("digits-0", "pca", COUNT - 1)
    assert (found["thumbnails"], found["unreadable"]) == (True, 1)
    assert found["records"] == [record for record in range(COUNT) if record != UNREADABLE]
    assert found["locations"][0] == HOSTILE
    assert all(len(found[name]) == COUNT - 1 for name in ("labels", "x", "y", "cluster", "score"))


def test_a_thumbnail_is_sent_as_an_image_that_browsers_cannot_run(service: MapService) -> None:
    response = service.get("/thumbnails/5")
    assert response.status_code == 200
    assert Image.open(io.BytesIO(response.content)).format == "WEBP"
    headers = response.headers
    assert headers["content-type"] == "image/webp"
    assert headers["x-content-type-options"] == "nosniff"
    assert {"default-src 'none'", "sandbox"} <= set(headers["content-security-policy"].split("; "))
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"].startswith("private")


def test_records_without_a_thumbnail_are_not_found(service: MapService) -> None:
    for record in (UNREADABLE, COUNT, 2**53):
        response = service.get(f"/thumbnails/{record}")
        assert (response.status_code, response.json()["code"]) == (404, "not_found"), record
    for record in ("-1", "x", str(2**53 + 1)):
        assert service.get(f"/thumbnails/{record}").status_code == 422
    Path(thumbnails_url(str(service.output), range(COUNT))).unlink()
    response = service.get("/thumbnails/5")
    assert response.status_code == 404
    assert "set thumbnails=true" in response.json()["detail"]


def test_maps_in_other_projects_and_of_unsuitable_jobs_are_refused(service: MapService) -> None:
    for path in ("", "/thumbnails/5"):
        assert service.get(path, project="theirs").status_code == 404
        assert service.get(path, scope="infer").status_code == 403
        assert service.get(path, job="embed-never").status_code == 404
        for kind, state, code in (("train", "succeeded", "not_possible"), ("embed", "running", "illegal_action")):
            ended = {"ended_at": 1.0} if state == "succeeded" else {}
            job = queued(service.store, kind=kind, state=state, attempt=1, started_at=1.0, **ended).id
            assert service.get(path, job=job).json()["code"] == code


def test_the_error_for_a_set_without_a_map_explains_how_to_add_one(service: MapService) -> None:
    Path(map_url(str(service.output))).unlink()
    response = service.get("")
    assert (response.status_code, response.json()["code"]) == (422, "not_possible")
    assert "set layout=pca" in response.json()["detail"]


@pytest.mark.parametrize("change", [{"labels": ["<script>"] * (COUNT - 1)}, {"x": [1e999] * (COUNT - 1)}, {"y": []}])
def test_hostile_maps_are_refused(service: MapService, change: dict[str, Any]) -> None:
    path = Path(map_url(str(service.output)))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    response = service.get("")
    assert (response.status_code, response.json()["code"]) == (422, "not_possible")
    assert "is damaged" in response.json()["detail"]
    assert len(response.content) < 2000


@pytest.mark.parametrize(
    "content",
    [
        b"<html><script>alert(1)</script></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF0000WEBP" + bytes(MAX_THUMBNAIL_BYTES),
    ],
)
def test_only_small_webp_images_are_served(service: MapService, content: bytes) -> None:
    path = Path(thumbnails_url(str(service.output), range(COUNT)))
    start = 8 * (COUNT + 1)
    path.write_bytes(np.array([start] + [start + len(content)] * COUNT, "<i8").tobytes() + content)
    response = service.get("/thumbnails/0")
    assert (response.status_code, response.json()["code"]) == (422, "not_possible")
    assert b"script" not in response.content
