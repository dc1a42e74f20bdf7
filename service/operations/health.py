"""Routes /livez, /readyz and /metrics for orchestrators, load balancers and Prometheus. They require no API key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from amd.storage import listdir
from service.db.engine import is_migrated
from service.jobs.execution.ray_jobs import Cluster
from service.operations import metrics
from service.web.errors import ClusterUnavailable

router = APIRouter(tags=["health"])

PROBE_TIMEOUT_S = 1.0
NOT_MIGRATED = "its schema is not up to date: run `python -m service migrate`"


class DependencyChecks:
    """Checks the database, storage and Ray, waiting at most PROBE_TIMEOUT_S, so that a probe never hangs."""

    def __init__(self, engine: Engine, root: str, cluster: Cluster) -> None:
        self._checks: dict[str, Callable[[], object]] = {
            "database": lambda: is_migrated(engine),
            "storage": lambda: listdir(root),
            "ray": cluster.capacity,
        }
        self._pool = ThreadPoolExecutor(len(self._checks), "health")
        self._newest: dict[str, Future[object]] = {}

    async def report(self) -> dict[str, str]:
        """Return the status of each dependency: `ok` or a description of the problem."""
        for part, check in self._checks.items():
            if part not in self._newest or self._newest[part].done():  # a check that hangs is not started again
                self._newest[part] = self._pool.submit(check)
        running = dict(self._newest)
        await asyncio.wait([_observed(check) for check in running.values()], timeout=PROBE_TIMEOUT_S)
        return {part: self._result(check) for part, check in running.items()}

    def close(self) -> None:
        """Stop idle threads; a hung check is abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _result(check: Future[object]) -> str:
        if not check.done():
            return f"did not respond within {PROBE_TIMEOUT_S:g} s"
        error = check.exception()
        if error is None:
            return "ok" if check.result() is not False else NOT_MIGRATED
        if isinstance(error, SQLAlchemyError):
            return f"does not respond: {type(error).__name__}"
        return error.message if isinstance(error, ClusterUnavailable) else f"cannot be read: {type(error).__name__}"


def _observed(check: Future[object]) -> asyncio.Future[object]:
    observed = asyncio.wrap_future(check)
    observed.add_done_callback(lambda done: done.cancelled() or done.exception())  # read in `_result`
    return observed


@router.get("/livez", summary="Liveness: the process responds")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Readiness: requests can be served", responses={503: {"description": "Not ready."}})
async def readyz(request: Request) -> Response:
    """Return 200 if the database is ready.

    The status of Ray, the storage and the background loops is reported, but does not affect readiness: jobs are
    accepted without them.
    """
    state = request.app.state
    parts = await state.checks.report()
    parts |= {monitor.name: monitor.report() for monitor in state.monitors}
    ready = parts["database"] == "ok"
    body: dict[str, Any] = {"status": "ok" if ready else "not ready", "parts": parts}
    return JSONResponse(body, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)


@router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
def prometheus(request: Request) -> Response:
    """Return metrics that contain only counts and times. Their only user-defined labels are deployment names.

    Only the control plane that reconciles jobs reports the state of jobs, webhooks and deployments.
    """
    return Response(metrics.render(request.app.state), media_type=CONTENT_TYPE_LATEST)
