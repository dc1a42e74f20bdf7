"""Fixtures for the console: an application with a fake cluster, and signed-in browsers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from service.app import create_app
from service.settings import Settings
from tests.support.browser.console_client import ConsoleClient
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def database(module_engine: Engine) -> Engine:
    return module_engine


@pytest.fixture(scope="module")
def app(database: Engine, folder: Path) -> Any:
    return new_app(database, folder, failure_limit="1000/minute")


def new_app(engine: Engine, folder: Path, **settings: Any) -> Any:
    values = {"data_dir": folder, "storage": str(folder / "root"), "serve_url": "http://127.0.0.1:1", **settings}
    return create_app(Settings(**values), engine=engine, cluster=FakeCluster())


@pytest.fixture
def anonymous(app: Any) -> ConsoleClient:
    return ConsoleClient(app, raise_server_exceptions=False)


@pytest.fixture
def console(anonymous: ConsoleClient, database: Engine) -> ConsoleClient:
    """Return a browser that is signed in with an admin key."""
    anonymous.sign_in(key_to(database, "admin")["Authorization"])
    return anonymous


@pytest.fixture
def reader(app: Any, database: Engine) -> ConsoleClient:
    """Return a browser that is signed in with a read-only key."""
    client = ConsoleClient(app, raise_server_exceptions=False)
    client.sign_in(key_to(database, "read")["Authorization"])
    return client
