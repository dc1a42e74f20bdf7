"""Request ids in responses, errors and the access log."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from asgi_correlation_id import CorrelationIdFilter
from sqlalchemy import Engine
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings


@pytest.fixture
def client(sqlite_engine: Engine, tmp_path: Path) -> TestClient:
    return TestClient(create_app(Settings(data_dir=tmp_path, storage=str(tmp_path)), engine=sqlite_engine))


def test_a_well_formed_request_id_is_kept_in_the_response_the_error_and_the_access_log(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.addFilter(CorrelationIdFilter())
    with caplog.at_level(logging.INFO, "service.access"):
        response = client.get("/v1/nothing", headers={"X-Request-Id": "my.request-1_a"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "my.request-1_a"
    (record,) = [record for record in caplog.records if record.name == "service.access"]
    assert record.correlation_id == "my.request-1_a"
    assert re.fullmatch(r"GET /v1/nothing 404 [\d.]+ ms", record.getMessage())


@pytest.mark.parametrize("given", ["", "two words", "a" * 65, "x\ty", "é"])
def test_a_missing_or_malformed_request_id_is_replaced(client: TestClient, given: str) -> None:
    header = {"X-Request-Id": given.encode()} if given else {}
    ids = {client.get("/livez", headers=header).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
