"""Fixtures for command-line tests: an empty context file, a served control plane, and the `amd` command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.support.service.command import amd as run_command
from tests.support.service.server import Server, serving

Command = Callable[..., tuple[int, str, str]]
SERVICE_VARIABLES = ("AMD_URL", "AMD_KEY", "AMD_KEY_FILE", "AMD_CONTEXT")


@pytest.fixture(autouse=True)
def context_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clear the environment's service settings, and use a context file that does not exist yet."""
    for name in SERVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AMD_CONFIG", str(tmp_path / "config" / "contexts.yaml"))
    monkeypatch.setenv("AMD_DATA_DIR", str(tmp_path / "no-stack"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "config" / "contexts.yaml"


@pytest.fixture
def server(sqlite_engine: Engine, tmp_path: Path) -> Iterator[Server]:
    with serving(sqlite_engine, tmp_path / "service") as server:
        yield server


@pytest.fixture
def service(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Point AMD_URL and AMD_KEY at the running control plane."""
    monkeypatch.setenv("AMD_URL", server.url)
    monkeypatch.setenv("AMD_KEY", server.key)
    return server


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the `amd` command; returns (exit code, standard output, standard error)."""
    return lambda *args: run_command(monkeypatch, capfd, *map(str, args))
