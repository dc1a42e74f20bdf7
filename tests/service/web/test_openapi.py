"""Tests for the OpenAPI schema: schemathesis generates requests from it and checks the responses against it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from amd.config import ImportConfig
from service.app import create_app
from service.settings import Settings
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.local_lab import LocalLab
from tests.support.service.server import serving

UNLIMITED = "1000000/minute"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("with_key", [True, False], ids=["with a key", "without"])
def test_schemathesis_finds_no_schema_violations(engine: Engine, tmp_path: Path, with_key: bool) -> None:
    unlimited = {"rate_limit": UNLIMITED, "failure_limit": UNLIMITED}
    with serving(engine, tmp_path, **unlimited) as server, closing(LocalLab(server.app).engine):
        command = [
            str(Path(sys.executable).parent / "schemathesis"),
            *("--config-file", str(Path(__file__).parent / "schemathesis.toml")),
            *("run", f"{server.url}/openapi.json", "--checks", "all", "--max-examples", "5", "--seed", "1"),
            *("--request-timeout", "60", "--generation-database", "none", "--no-color"),
        ]
        if with_key:
            command += ["--header", f"Authorization: Bearer {server.key}"]
        else:
            command += ["--exclude-checks", "positive_data_acceptance"]  # every request is rejected
        found = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert found.returncode == 0, found.stdout[-8000:]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_openapi_3_1_schema_has_examples_descriptions_and_problem_details(engine: Engine, tmp_path: Path) -> None:
    with serving(engine, tmp_path) as server:
        schema = httpx.get(f"{server.url}/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    assert schema["components"]["schemas"]["JobRequest"]["examples"]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert "application/problem+json" in operation["responses"]["4XX"]["content"], (method, path)
            assert operation.get("summary"), (method, path)
            for parameter in operation.get("parameters", ()):
                assert parameter.get("description"), (method, path, parameter["name"])


def test_every_number_in_a_request_has_bounds(sqlite_engine: Engine, tmp_path: Path) -> None:
    """Numbers in configs are exempt, because `service.jobs.config_bounds` checks them."""
    app = create_app(Settings(storage=str(tmp_path), data_dir=tmp_path), engine=sqlite_engine, cluster=FakeCluster())
    document = app.openapi()
    schemas, unbounded = document["components"]["schemas"], list[str]()
    config_fields = {f"ImportRequest.{name}" for name in ImportConfig.model_fields}

    def visit(schema: dict[str, Any], where: str, seen: frozenset[str] = frozenset()) -> None:
        name = schema.get("$ref", "").rpartition("/")[2]
        if name and name not in seen:
            visit(schemas[name], name, seen | {name})
        if schema.get("type") in ("integer", "number"):
            bounds = schema.keys() & {"minimum", "exclusiveMinimum"}, schema.keys() & {"maximum", "exclusiveMaximum"}
            if not all(bounds):
                unbounded.append(where)
        for each in (*schema.get("anyOf", ()), *schema.get("allOf", ()), *schema.get("prefixItems", ())):
            visit(each, where, seen)
        if isinstance(schema.get("items"), dict):
            visit(schema["items"], where, seen)
        for key, value in schema.get("properties", {}).items():
            visit(value, f"{where}.{key}", seen)

    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                visit(parameter["schema"], f"{method} {path} {parameter['name']}")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                visit(content["schema"], f"{method} {path}")
    harmless = {"NeighboursRequest.vector"}  # finite, and scaled to unit length
    assert set(unbounded) - config_fields == harmless
