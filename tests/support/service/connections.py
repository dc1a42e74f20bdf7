"""Refuse network connections, so that tests can detect connection attempts without making a real connection."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVENTS = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
_refused: list[str] | None = None
_installed = False


@contextmanager
def refused_connections() -> Iterator[list[str]]:
    """Refuse connections and DNS lookups made by this process; yield the list of attempts."""
    global _refused, _installed
    if not _installed:
        sys.addaudithook(_refuse)  # cannot be removed, so it is active only while the list exists
        _installed = True
    _refused = []
    try:
        yield _refused
    finally:
        _refused = None


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _refused is not None and event in EVENTS:
        _refused.append(f"{event}{arguments}")
        raise ConnectionRefusedError(f"a test must not connect: {event}{arguments}")
