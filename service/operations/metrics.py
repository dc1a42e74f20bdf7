"""Prometheus metrics of a control plane: its own counters, and the state of jobs in the database.

Only the control plane that reconciles jobs exports the state of jobs, webhooks and deployments, so that summing over
control planes counts nothing twice. Metrics contain counts and times; their only user-defined labels are deployment
names.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.db.models import Delivery, Job
from service.jobs.schemas import WAITING
from service.projects.storage import StoredBytesStore

logger = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class RequestMetrics:
    """ASGI middleware that measures requests by route template."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._seconds = Histogram(
            "amd_http_request_seconds",
            "Time until the response started, by method, route and status.",
            ["method", "route", "status"],
            registry=registry,
            buckets=SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()

        async def send_and_measure(message: Message) -> None:
            if message["type"] == "http.response.start":
                labels = self._seconds.labels(scope["method"], _template(scope), str(message["status"]))
                labels.observe(time.monotonic() - began)
            await send(message)

        await self._app(scope, receive, send_and_measure)


def _template(scope: Scope) -> str:
    """Return the path template of the request's route, including its router's prefix, or `unmatched`."""
    route: str | None = getattr(scope.get("route"), "path", None)
    if route is None:
        return "unmatched"
    prefix = scope["path"].rsplit("/", route.count("/"))[0]
    return route if route.startswith(f"{prefix}/") else prefix + route


def render(state: Any) -> bytes:
    """Return the metrics of an application, given its state. Omits database metrics while the database is down."""
    own = CollectorRegistry()
    _add_loops(own, state)
    _add_pools(own, state)
    is_up = Gauge("amd_database_up", "Whether the database responded to this request.", registry=own)
    text = b""
    try:
        if all(monitor.has_lease is not False for monitor in state.monitors if monitor.name == "reconciler"):
            text = generate_latest(_database_metrics(state))
        is_up.set(1)
    except SQLAlchemyError as error:
        logger.warning("database metrics are omitted: %s", error)
    return text + b"".join(map(generate_latest, (own, state.http_metrics, state.gateway.metrics.registry)))


def _add_loops(registry: CollectorRegistry, state: Any) -> None:
    age = Gauge("amd_loop_age_seconds", "Time since a loop last completed a step.", ["loop"], registry=registry)
    holds = Gauge("amd_lease_held", "Whether this control plane holds the loop's lease.", ["loop"], registry=registry)
    for monitor in state.monitors:
        age.labels(monitor.name).set(monitor.age_s)
        if monitor.has_lease is not None:
            holds.labels(monitor.name).set(monitor.has_lease)


def _add_pools(registry: CollectorRegistry, state: Any) -> None:
    used = Gauge("amd_pool_used", "Threads or connections in use, by dependency.", ["pool"], registry=registry)
    size = Gauge(
        "amd_pool_size", "Maximum number of threads or connections, by dependency.", ["pool"], registry=registry
    )
    for name, calls in (("storage", state.storage_calls), ("ray", state.ray_calls)):
        used.labels(name).set(calls.running)
        size.labels(name).set(calls.threads)
    engine: Engine = state.engine
    if isinstance(engine.pool, QueuePool):
        used.labels("database").set(engine.pool.checkedout())
        size.labels("database").set(engine.pool.size() + engine.pool._max_overflow)


def _database_metrics(state: Any) -> CollectorRegistry:
    registry = CollectorRegistry()
    jobs = Gauge("amd_jobs", "Number of jobs by kind and state.", ["kind", "state"], registry=registry)
    for (kind, name), count in state.jobs.counts().items():
        jobs.labels(kind, name).set(count)
    oldest = Gauge("amd_queue_age_seconds", "Age of the oldest waiting job; 0 if none waits.", registry=registry)
    backlog = Gauge("amd_webhook_backlog", "Number of deliveries that wait for an attempt.", registry=registry)
    with Session(state.engine.execution_options(reads_only=True)) as session:
        ages = [session.scalar(select(func.min(Job.created_at)).where(Job.state == each)) for each in sorted(WAITING)]
        waiting = session.scalar(select(func.count()).select_from(Delivery).where(Delivery.state == "waiting"))
    hours = Gauge(
        "amd_usage_hours",
        "Hours for which jobs reserved GPUs or CPUs since the start of the month (UTC), by resource.",
        ["resource"],
        registry=registry,
    )
    used = state.month_usage.by_project(time.time()).values()
    hours.labels("gpu").set(sum(each.gpus for each in used))
    hours.labels("cpu").set(sum(each.cpus for each in used))
    replicas = Gauge(
        "amd_deployment_replicas", "Replicas that hold resources, by deployment.", ["deployment"], registry=registry
    )
    for deployment in state.deployments.all():
        replicas.labels(deployment.name).set(deployment.replicas)
    stored = Gauge("amd_stored_bytes", "Bytes that all projects store, as last measured.", registry=registry)
    stored.set(sum(StoredBytesStore(state.engine).by_project().values()))
    oldest.set(max((time.time() - at for at in ages if at is not None), default=0.0))
    backlog.set(waiting or 0)
    return registry
