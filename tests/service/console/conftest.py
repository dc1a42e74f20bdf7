"""Fixtures for the console: an application with a fake cluster, and signed-in browsers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from service.app import create_app
from service.settings import Settings
from tests.support.browser.console_client import ConsoleClient
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.oidc_provider import AUDIENCE, CLIENT_ID, CLIENT_SECRET, Provider, running_provider

NewBrowser = Callable[..., ConsoleClient]


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


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


@pytest.fixture
def new_browser(database: Engine, folder: Path, provider: Provider) -> NewBrowser:
    """Return a function that creates a browser, with a new service unless it is given another browser's."""

    def create(app: Any = None, base_url: str = "http://testserver", **settings: Any) -> ConsoleClient:
        issuer = {"oidc_issuer": provider.url, "oidc_audience": AUDIENCE, "oidc_client_id": CLIENT_ID}
        secret = {"oidc_client_secret": CLIENT_SECRET, "failure_limit": "1000/minute"}
        app = app or new_app(database, folder, **{**issuer, **secret, **settings})
        return ConsoleClient(app, base_url=base_url, raise_server_exceptions=False)

    return create


@pytest.fixture
def browser(new_browser: NewBrowser) -> ConsoleClient:
    return new_browser()
