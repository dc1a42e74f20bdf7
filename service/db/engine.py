"""Engines for SQLite and PostgreSQL, and schema migrations with Alembic."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Dialect, Engine, create_engine, event, make_url, text
from sqlalchemy.pool import ConnectionPoolEntry

BUSY_TIMEOUT_S = 30  # how long SQLite waits for another writer

# Limits for PostgreSQL, so that a server or network that stops responding delays each caller only by seconds.
CONNECT_TIMEOUT_S = 3
LOCK_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 10
RESPONSE_TIMEOUT_S = 12.0
"""Maximum time that a connection waits for a response. The server enforces the other limits, but may have stopped."""
POOL_TIMEOUT_S = 5
PAUSE_S = 1.0
"""Time after a failed connection attempt in which further attempts fail immediately, so that no requests pile up."""
NETWORK_OPTIONS = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds without an acknowledgement, after which the connection is closed
}


class TimedConnection(psycopg.Connection[Any]):
    """A connection that is closed if the server does not respond within RESPONSE_TIMEOUT_S."""

    _waits_forever = False

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """Run a generator as psycopg does, but with a timeout. Raises OperationalError when the timeout expires."""
        if self._waits_forever:
            return super().wait(gen, *args, **options)
        began = time.monotonic()
        try:
            return super().wait(gen, *args, **{"timeout": RESPONSE_TIMEOUT_S, **options})
        except psycopg.OperationalError:
            if time.monotonic() - began >= RESPONSE_TIMEOUT_S:
                self.pgconn.finish()  # a late response could be mistaken for the next one
            raise

    def wait_forever(self) -> None:
        """Remove the timeout, for migrations."""
        self._waits_forever = True


def open_engine(url: str) -> Engine:
    """Create an engine that behaves identically on SQLite and PostgreSQL. Raises ArgumentError for an invalid URL."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        engine = create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20, pool_timeout=POOL_TIMEOUT_S)
        if parsed.get_driver_name() == "psycopg":
            _limit_waits(engine)
        return engine
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S}, pool_size=10, max_overflow=20)

    @event.listens_for(engine, "connect")
    def _tune(connection: Any, entry: ConnectionPoolEntry) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        connection.isolation_level = None  # no implicit transactions: `_begin` issues BEGIN

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        # Writers queue here, where the busy timeout applies; upgrading a read to a write would fail immediately.
        mode = "" if connection.get_execution_options().get("reads_only") else "IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def _limit_waits(engine: Engine) -> None:
    """Limit the time spent waiting for PostgreSQL: for a connection, a lock, a statement or a response."""
    limits = {
        "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
        "lock_timeout": f"{LOCK_TIMEOUT_S}s",
        "idle_in_transaction_session_timeout": "60s",
    }
    settings = " ".join(f"-c {name}={value}" for name, value in limits.items())
    connect = _ConnectionAttempts()

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Dialect, entry: ConnectionPoolEntry, args: list[Any], options: dict[str, Any]) -> Any:
        chosen = {"connect_timeout": CONNECT_TIMEOUT_S, **NETWORK_OPTIONS, **options}  # URL options take precedence
        chosen["options"] = f"{settings} {options.get('options', '')}".strip()
        return connect(lambda: TimedConnection.connect(*args, **chosen))


class _ConnectionAttempts:
    """Rejects connection attempts for PAUSE_S after one has failed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._failed_at = float("-inf")

    def __call__(self, connect: Callable[[], TimedConnection]) -> TimedConnection:
        with self._lock:
            error = self._error if time.monotonic() - self._failed_at < PAUSE_S else None
        if error is not None:
            raise psycopg.OperationalError(f"not connecting, because the last attempt failed moments ago: {error}")
        try:
            return connect()
        except psycopg.OperationalError as failure:
            with self._lock:
                self._error, self._failed_at = failure, time.monotonic()
            raise


def migrate(engine: Engine) -> None:
    """Upgrade the schema to the latest migration, without a time limit on its statements."""
    with engine.begin() as connection:
        if isinstance(own := connection.connection.driver_connection, TimedConnection):
            connection.execute(text("SET statement_timeout = 0; SET lock_timeout = '60s'"))
            own.wait_forever()
            connection.detach()  # closed at the end instead of returned to the pool
        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def is_migrated(engine: Engine) -> bool:
    """Whether the schema is up to date."""
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        return context.get_current_revision() == ScriptDirectory.from_config(_alembic()).get_current_head()


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
