"""Tests for parsing inference requests, through a real HTTP stack and without a replica."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from service.auth.isolation import LocationPolicy
from service.auth.uri_policy import UriPolicy
from service.registry.ownership import StorageOwners
from service.serving.requests import read_request
from service.web import error_handlers


@pytest.fixture
def client(tmp_path: Path, sqlite_engine: Engine) -> TestClient:
    root = str(tmp_path)
    app, policy = FastAPI(), LocationPolicy(UriPolicy(root, ()), StorageOwners(sqlite_engine, root))

    @app.post("/read")
    async def read(request: Request) -> Any:
        parsed = await read_request(request, policy, "default")
        items = [
            {"content": base64.b64encode(item["content"]).decode()} if "content" in item else item
            for item in parsed.items
        ]
        return {"items": items, "options": parsed.options.model_dump(), "single": parsed.single}

    error_handlers.install(app)
    return TestClient(app)


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_file_of_each_content_type_is_one_item(client: TestClient, tmp_path: Path) -> None:
    content = b"\x89PNG\x00\xff"
    cases: list[dict[str, Any]] = [
        {"content": content, "headers": {"Content-Type": "image/png"}},
        {"content": content, "headers": {"Content-Type": "application/octet-stream"}},
        {"files": {"anything": ("name.png", content)}},
        {"json": {"input": {"base64": to_base64(content)}}},
        {"json": {"input": f"data:image/png;base64,{to_base64(content)}"}},
    ]
    for case in cases:
        found = client.post("/read", **case).json()
        assert found["items"] == [{"content": to_base64(content)}], case
        assert found["single"]
    found = client.post("/read", json={"input": [str(tmp_path / "a b.mp4")]}).json()
    assert (found["items"], found["single"]) == ([{"uri": str(tmp_path / "a b.mp4")}], False)


def test_options_are_parsed_identically_from_a_query_a_form_and_json(client: TestClient) -> None:
    options: dict[str, Any] = {"normalize": True, "tokens": "patch", "layers": [2, 4], "top_k": 3, "views": "5x3"}
    options |= {"mask_ratio": 0.5, "seed": 7}
    query = "/read?normalize=true&tokens=patch&layers=2&layers=4&top_k=3&views=5x3&mask_ratio=0.5&seed=7"
    fields = {"normalize": "true", "tokens": "patch", "layers": ["2", "4"], "top_k": "3", "views": "5x3"}
    fields |= {"mask_ratio": "0.5", "seed": "7"}
    for response in (
        client.post(query, content=b"x", headers={"Content-Type": "image/png"}),
        client.post("/read", files={"file": ("a", b"x")}, data=fields),
        client.post("/read", json={"input": {"base64": "eA=="}, **options}),
    ):
        assert response.status_code == 200, response.text
        assert response.json()["options"].items() >= options.items()


@pytest.mark.parametrize(
    ("case", "status", "pointer"),
    [
        ({"content": b"", "headers": {"Content-Type": "image/png"}}, 422, "#/"),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, None),
        ({"content": b"x"}, 415, None),
        ({"json": {"input": []}}, 422, "#/input"),
        ({"json": {}}, 422, "#/input"),
        ({"json": {"input": {"base64": "no base64!"}}}, 422, "#/input/0"),
        ({"json": {"input": {"base64": ""}}}, 422, "#/input/0"),
        ({"json": {"input": "data:image/png,plain"}}, 422, "#/input/0"),
        ({"json": {"input": "neither-base64-nor-uri"}}, 422, "#/input/0"),
        ({"json": {"input": "/etc/passwd"}}, 422, None),
        ({"json": {"input": "s3://other/bucket"}}, 422, None),
        ({"json": {"input": {"base64": "eA=="}, "colour": 1}}, 422, "#/colour"),
        ({"json": {"input": {"base64": "eA=="}, "views": "0x0"}}, 422, "#/views"),
        ({"files": {"file": ("a", b"")}}, 422, "#/"),
        ({"data": {"normalize": "true"}, "files": {}}, 415, None),
        ({"files": {"file": ("a", b"x")}, "data": {"top_k": "many"}}, 422, "#/top_k"),
        ({"json": {"input": {"base64": "eA=="}, "mask_ratio": 1}}, 422, "#/mask_ratio"),
        ({"json": {"input": {"base64": "eA=="}, "seed": -1}}, 422, "#/seed"),
    ],
)
def test_the_error_for_an_invalid_request_contains_the_field(
    client: TestClient, case: dict[str, Any], status: int, pointer: str | None
) -> None:
    response = client.post("/read", **case)
    assert response.status_code == status, response.text
    if pointer is not None:
        assert response.json()["errors"][0]["pointer"].startswith(pointer)
