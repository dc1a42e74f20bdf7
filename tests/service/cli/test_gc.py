"""Tests for `amd gc` against a real control plane, and on a storage root without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from tests.service.operations.retention.stored_data import StoredData
from tests.service.operations.retention.test_collection import FAILED
from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]


def test_a_dry_run_reports_what_the_service_then_frees(
    service: Server, sqlite_engine: Engine, amd: Command, tmp_path: Path
) -> None:
    data = StoredData(tmp_path / "service" / "root", sqlite_engine, [FAILED])
    assert "no retention policy is set" in amd("gc")[2]
    before = data.files()
    report = json.loads(amd("gc", "--dry-run", "--checkpoints-days", "10", "--json")[1])
    assert data.files() == before
    code, out, _ = amd("gc", "--checkpoints-days", 10)
    assert code == 0
    assert f"freed {report['bytes']:,} bytes in 2 files" in out
    assert sum(before.values()) - sum(data.files().values()) == report["bytes"] > 0
    assert amd("gc", "--checkpoints-days", "0")[0] == 2


def test_a_storage_root_is_cleaned_up_without_a_service(sqlite_engine: Engine, amd: Command, tmp_path: Path) -> None:
    data = StoredData(tmp_path / "root", sqlite_engine, [FAILED._replace(state=None)])
    code, out, _ = amd("gc", "--storage", tmp_path / "root", "--checkpoints-days", 10, "--logs-days", 10)
    assert (code, "freed 202 bytes in 3 files" in out) == (0, True)
    assert "runs/train-0/run.json" in data.files()
