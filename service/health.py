"""/livez, /readyz and /metrics: for whatever starts, routes to and watches the control plane. Without a key."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from sqlalchemy.exc import SQLAlchemyError

from amd.storage import listdir
from service.db import is_migrated
from service.errors import ClusterUnavailable

router = APIRouter(tags=["health"])


@router.get("/livez", summary="Whether the process answers")
def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Whether requests can be served", responses={503: {"description": "Not now."}})
def readyz(request: Request) -> Response:
    """The database decides: jobs are accepted and read without Ray and without the storage, which are only reported."""
    state = request.app.state
    parts = {"database": "ok", "storage": "ok", "ray": "ok"}
    try:
        if not is_migrated(state.engine):
            parts["database"] = "its tables are not up to date: run `python -m service migrate`"
    except SQLAlchemyError as error:
        parts["database"] = f"does not answer: {type(error).__name__}"
    try:
        listdir(state.settings.root)
    except Exception as error:  # every backend raises its own kinds
        parts["storage"] = f"cannot be read: {type(error).__name__}"
    try:
        state.cluster.capacity()
    except ClusterUnavailable as error:
        parts["ray"] = error.message
    ready = parts["database"] == "ok"
    body: dict[str, Any] = {"status": "ok" if ready else "not ready", "parts": parts}
    return JSONResponse(body, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)


@router.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)
def prometheus(request: Request) -> Response:
    """Counts alone: no names, no labels that users choose."""
    registry = CollectorRegistry()
    jobs = Gauge("amd_jobs", "Jobs by kind and state.", ["kind", "state"], registry=registry)
    for (kind, state), count in request.app.state.jobs.counts().items():
        jobs.labels(kind, state).set(count)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
