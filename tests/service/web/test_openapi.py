"""Tests for the OpenAPI schema: schemathesis generates requests from it and checks the responses against it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine

from tests.support.service.server import serving

UNLIMITED = "1000000/minute"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("with_key", [True, False], ids=["with a key", "without"])
def test_schemathesis_finds_no_violations_of_the_schema(engine: Engine, tmp_path: Path, with_key: bool) -> None:
    with serving(engine, tmp_path, rate_limit=UNLIMITED, failure_limit=UNLIMITED) as server:
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
def test_the_schema_is_openapi_3_1_with_examples_descriptions_and_problem_details(
    engine: Engine, tmp_path: Path
) -> None:
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
