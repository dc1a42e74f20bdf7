"""Routes /livez, /readyz and /metrics for orchestrators, load balancers and Prometheus. They require no API key."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from sqlalchemy.exc import SQLAlchemyError

from amd.storage import listdir
from service.db.engine import is_migrated
from service.jobs.execution.ray_jobs import Cluster
from service.web.errors import ClusterUnavailable

router = APIRouter(tags=["health"])

PROBE_TIMEOUT_S = 1.0


class DependencyChecks:
    """Checks storage and Ray, waiting at most PROBE_TIMEOUT_S so that a probe never hangs on a dependency."""

    def __init__(self, root: str, cluster: Cluster) -> None:
        self._checks: dict[str, Callable[[], object]] = {"storage": lambda: listdir(root), "ray": cluster.capacity}
        self._pool = ThreadPoolExecutor(len(self._checks), "health")
        self._lock = threading.Lock()  # probes run in threads, several at a time
        self._newest: dict[str, Future[object]] = {}

    def report(self) -> dict[str, str]:
        """Return the status of each dependency: `ok` or a description of the problem. Thread-safe."""
        with self._lock:
            for part, check in self._checks.items():
                if part not in self._newest or self._newest[part].done():  # a check that hangs is not started again
                    self._newest[part] = self._pool.submit(check)
            running = dict(self._newest)
        wait(running.values(), PROBE_TIMEOUT_S)
        return {part: self._result(check) for part, check in running.items()}

    @staticmethod
    def _result(check: Future[object]) -> str:
        if not check.done():
            return f"did not respond within {PROBE_TIMEOUT_S:g} s"
        error = check.exception()
        if error is None:
            return "ok"
        return error.message if isinstance(error, ClusterUnavailable) else f"cannot be read: {type(error).__name__}"


@router.get("/livez", summary="Liveness: the process responds")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Readiness: requests can be served", responses={503: {"description": "Not ready."}})
def readyz(request: Request) -> Response:
    """Return 200 if the database is ready.

    The status of Ray and the storage is reported, but does not affect readiness: jobs are accepted without them.
    """
    state = request.app.state
    parts = {"database": "ok"}
    try:
        if not is_migrated(state.engine):
            parts["database"] = "its schema is not up to date: run `python -m service migrate`"
    except SQLAlchemyError as error:
        parts["database"] = f"does not respond: {type(error).__name__}"
    parts |= state.checks.report()
    ready = parts["database"] == "ok"
    body: dict[str, Any] = {"status": "ok" if ready else "not ready", "parts": parts}
    return JSONResponse(body, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)


@router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
def prometheus(request: Request) -> Response:
    """Return metrics that contain only counts, without names or user-defined labels."""
    registry = CollectorRegistry()
    jobs = Gauge("amd_jobs", "Number of jobs by kind and state.", ["kind", "state"], registry=registry)
    for (kind, state), count in request.app.state.jobs.counts().items():
        jobs.labels(kind, state).set(count)
    text = generate_latest(registry) + generate_latest(request.app.state.gateway.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
