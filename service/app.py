"""The control plane's HTTP application, assembled from its packages.

Does not import torch, run jobs or start threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES as UNCOMPRESSED
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import BaseRoute

from amd.storage import read_json
from service.auth import api_keys, session_routes
from service.auth.authentication import Authenticator
from service.auth.code_flow import CodeFlow
from service.auth.isolation import LocationPolicy
from service.auth.middleware import AuthenticationMiddleware
from service.auth.rate_limits import RateLimitHeaders
from service.auth.sessions import BrowserSessions
from service.auth.stream_limits import StreamLimits
from service.auth.uri_policy import UriPolicy
from service.background import StepMonitor
from service.console import routes as console
from service.console.security import BrowserHeaders
from service.db.engine import open_engine
from service.jobs import catalog
from service.jobs import routes as jobs
from service.jobs.details import routes as job_details
from service.jobs.execution.ray_jobs import Cluster, RayJobs
from service.jobs.metrics import MetricsCache
from service.jobs.streams import JobWatcher
from service.lab import routes as lab
from service.lab.gateway import LabGateway
from service.operations import cluster as cluster_state
from service.operations import health
from service.operations.doctor import routes as doctor
from service.operations.metrics import RequestMetrics
from service.operations.retention import routes as retention
from service.projects import routes as projects
from service.projects.usage import CachedUsage, start_of_month
from service.registry import routes as encoders
from service.registry.ownership import StorageOwners
from service.registry.store import EncoderStore
from service.reports import routes as reports
from service.serving import revision_routes as deployment_revisions
from service.serving import routes as serving
from service.serving.deployments import DeploymentStore
from service.serving.gateway import Gateway
from service.serving.protocol import ARROW
from service.serving.reservations import projects_in_use
from service.serving.responses import NUMPY
from service.serving.serve_api import ServeApi
from service.settings import Settings
from service.similarity import map_routes
from service.similarity import routes as neighbours
from service.similarity.neighbours import EmbeddingCache
from service.web import error_handlers, errors
from service.web.bounded_calls import BoundedCalls
from service.web.downloads import BINARY, TAR
from service.web.errors import ClusterNotResponding, IssuerUnavailable, ServiceError, StorageUnavailable
from service.web.middleware import AccessLogMiddleware, plain_request_id
from service.web.request_bodies import BodyBudget, BodyLimitMiddleware
from service.webhooks import routes as webhooks
from service.webhooks.store import job_store

RAY_THREADS, RAY_TIMEOUT_S = 4, 5.0
ISSUER_THREADS, ISSUER_TIMEOUT_S = 4, 10.0  # for signing in; bearer tokens are validated in other threads
DOCTOR_THREADS, DOCTOR_TIMEOUT_S = 32, 20.0  # longer than the dependencies' own timeouts
COLLECTION_THREADS = 2  # a collection and a dry run

DESCRIPTION = """Pre-train small vision encoders with Asymmetric Masked Distillation, tune hyperparameters and monitor
runs.

Errors are RFC 9457 problem details with a stable `code`. Lists are paginated with `cursor`. Requests that submit a job
accept an `Idempotency-Key`; repeating a request with the same key returns the same job."""


def create_app(settings: Settings, *, engine: Engine | None = None, cluster: Cluster | None = None) -> FastAPI:
    """Create the application. `engine` and `cluster` default to those configured in `settings`."""
    engine = engine or open_engine(settings.database)
    store = job_store(engine)
    watcher = JobWatcher(store)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        polling = [asyncio.create_task(task) for task in (watcher.run(), app.state.stream_limits.run())]
        try:
            yield
        finally:
            for task in polling:
                task.cancel()
            await app.state.gateway.close()
            calls = (app.state.storage_calls, app.state.ray_calls, app.state.doctor_calls, app.state.issuer_calls)
            for pool in (*calls, app.state.checks):
                pool.close()
            app.state.collections.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="AMD service",
        version=version("amd-service"),
        description=DESCRIPTION,
        lifespan=lifespan,
        routes=_routes(),
        separate_input_output_schemas=False,
    )
    app.state.settings = settings
    app.state.engine = engine
    app.state.jobs = store
    app.state.watcher = watcher
    app.state.metrics = MetricsCache()
    app.state.cluster = cluster or RayJobs(settings.ray_dashboard, settings.ray_token_file, settings.ray_python)
    app.state.storage_calls = storage = BoundedCalls(
        "storage root", settings.storage_threads, settings.storage_timeout_s, StorageUnavailable
    )
    app.state.ray_calls = BoundedCalls("cluster", RAY_THREADS, RAY_TIMEOUT_S, ClusterNotResponding)
    app.state.doctor_calls = BoundedCalls("dependency", DOCTOR_THREADS, DOCTOR_TIMEOUT_S, ServiceError)
    app.state.collections = ThreadPoolExecutor(COLLECTION_THREADS, "gc")
    app.state.http_metrics = CollectorRegistry()
    app.state.monitors = list[StepMonitor]()
    app.state.encoders = EncoderStore(engine)
    app.state.deployments = DeploymentStore(engine)
    app.state.projects_in_use = projects_in_use(engine)
    app.state.gateway = Gateway(app.state.deployments, settings.serve)
    app.state.serve_api = ServeApi(
        settings.ray_dashboard, settings.ray_token_file, settings.serve_host, settings.serve_port, settings.serve
    )
    app.state.lab = LabGateway(app.state.gateway, app.state.serve_api)
    app.state.embedding_cache = EmbeddingCache()
    app.state.month_usage = CachedUsage(engine, start_of_month)
    app.state.authenticator = Authenticator(engine, settings)
    app.state.sessions = BrowserSessions(engine, app.state.authenticator)
    app.state.code_flow = CodeFlow.of(settings, app.state.authenticator.issuer)
    app.state.issuer_calls = BoundedCalls("OIDC issuer", ISSUER_THREADS, ISSUER_TIMEOUT_S, IssuerUnavailable)
    app.state.stream_limits = StreamLimits(app.state.authenticator, settings.max_streams, settings.stream_lifetime_s)
    app.state.checks = health.DependencyChecks(engine, settings.root, app.state.cluster)
    uris = UriPolicy(settings.root, settings.allowed_uris)
    owners = StorageOwners(engine, settings.root, lambda url: storage.run_from_thread(read_json, url))
    app.state.locations = LocationPolicy(uris, owners)
    error_handlers.install(app)
    _add_middleware(app, settings)
    return app


@functools.cache
def _routes() -> list[BaseRoute]:
    """Return the routes, which all applications in a process share.

    FastAPI takes a tenth of a second to resolve them.
    """
    api = APIRouter(responses={"4XX": _problem("Client error."), "5XX": _problem("Server error.")})
    api.include_router(health.router)
    for router in (
        *(jobs.router, job_details.router, reports.router, neighbours.router, map_routes.router, catalog.router),
        *(cluster_state.router, retention.router, doctor.router, encoders.router, lab.router),
        *(serving.inference, serving.deployments, deployment_revisions.router),
        *(api_keys.router, session_routes.router, webhooks.router, projects.router),
    ):
        api.include_router(router, prefix="/v1")
    api.include_router(serving.openai)
    for router in console.ROUTERS:
        api.include_router(router, include_in_schema=False)
    return api.routes


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """Add the middleware, innermost first. The caller is identified before the request body is read."""
    app.add_middleware(
        GZipMiddleware, minimum_size=1024, exclude_content_types=(*UNCOMPRESSED, BINARY, TAR, ARROW, NUMPY)
    )
    limit, files_limit, budget = (
        int(mib * 2**20) for mib in (settings.max_body_mib, settings.max_upload_mib, settings.bodies_mib)
    )
    app.add_middleware(
        BodyLimitMiddleware,
        limit=limit,
        files=console.FILE_PATHS,
        files_limit=files_limit,
        forms=console.FORM_PATHS,
        budget=BodyBudget(budget),
    )
    app.add_middleware(
        AuthenticationMiddleware,
        authenticator=app.state.authenticator,
        settings=settings,
        inference=console.FILE_PATHS,
        sessions=app.state.sessions,
    )
    app.add_middleware(BrowserHeaders)
    app.add_middleware(RateLimitHeaders)
    app.add_middleware(RequestMetrics, registry=app.state.http_metrics)
    app.add_middleware(AccessLogMiddleware)
    app.add_middleware(
        CorrelationIdMiddleware,
        header_name="X-Request-Id",
        update_request_header=False,
        validator=None,
        transformer=plain_request_id,
    )


def _problem(description: str) -> dict[str, Any]:
    return {"model": errors.Problem, "description": description, "content": {errors.MEDIA_TYPE: {}}}
