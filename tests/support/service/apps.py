"""Helpers that create a minimal app for testing routes, with real authentication and error handling, and API keys."""

from __future__ import annotations

import time

from fastapi import APIRouter, FastAPI
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service.auth.authentication import Authenticator, new_secret
from service.auth.middleware import AuthenticationMiddleware
from service.auth.rate_limits import RateLimitHeaders
from service.db.models import ApiKey
from service.serving.routes import INFERENCE_PATHS
from service.settings import Settings
from service.web import error_handlers
from service.web.bounded_calls import BoundedCalls
from service.web.errors import StorageUnavailable


def client_of(engine: Engine, *routers: APIRouter, settings: Settings | None = None) -> TestClient:
    app = FastAPI()
    app.state.settings = settings or Settings()
    app.state.engine = engine
    app.state.storage_calls = BoundedCalls("storage root", 4, 60.0, StorageUnavailable)
    app.state.authenticator = Authenticator(engine, app.state.settings)
    error_handlers.install(app)
    authenticator = app.state.authenticator
    app.add_middleware(
        AuthenticationMiddleware, authenticator=authenticator, settings=app.state.settings, inference=INFERENCE_PATHS
    )
    app.add_middleware(RateLimitHeaders)
    for router in routers:
        app.include_router(router, prefix="/v1")
    return TestClient(app, raise_server_exceptions=False)


def key_to(
    engine: Engine,
    *scopes: str,
    project: str | None = None,
    expires_at: float | None = None,
    revoked_at: float | None = None,
) -> dict[str, str]:
    """Create an API key with these scopes and return its Authorization header."""
    secret = new_secret()
    row = ApiKey(
        id=secret.id,
        name="test key",
        project=project,
        scopes=list(scopes),
        digest=secret.digest,
        created_at=time.time(),
        created_by="test",
        expires_at=expires_at,
        revoked_at=revoked_at,
        used_at=None,
    )
    with Session(engine) as session, session.begin():
        session.add(row)
    return {"Authorization": f"Bearer {secret}"}
