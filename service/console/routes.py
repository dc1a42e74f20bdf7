"""Console router: the pages, the static files, and the paths that accept forms and files."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse, RedirectResponse, Response

from service.auth.sessions import PREFIX
from service.console.pages import (
    activity,
    deployments,
    embedding_maps,
    encoders,
    job_data,
    jobs,
    lab,
    new_job,
    operations,
    projects,
    retention,
    sign_in,
    sweeps,
)
from service.console.rendering import STATIC, STATIC_PREFIX
from service.console.security import ConsoleRoute
from service.serving.routes import INFERENCE_PATHS
from service.web.errors import NotFound

FILE_PATHS = re.compile(rf"{INFERENCE_PATHS.pattern}|{PREFIX}/encoders/[^/]+/try|{PREFIX}/lab/masks")
FORM_PATHS = re.compile(rf"{PREFIX}/.*")
FOR_GOOD = "public, max-age=31536000, immutable"
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".txt": "text/plain"}

router = APIRouter()


@router.get("/")
def open_console() -> Response:
    return RedirectResponse(PREFIX, HTTPStatus.SEE_OTHER)


@router.get(PREFIX)
def home() -> Response:
    return RedirectResponse(f"{PREFIX}/jobs", HTTPStatus.SEE_OTHER)


@router.get(f"{STATIC_PREFIX}/{{file:path}}")
def static_file(file: Annotated[str, Path(pattern=r"^[a-z0-9_-]+(/[a-z0-9_-]+)*(\.[a-z]+)+$")]) -> Response:
    path = STATIC / file
    if not path.is_file() or path.suffix not in MEDIA_TYPES:
        raise NotFound(f"there is no file {file!r}")
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers={"Cache-Control": FOR_GOOD})


_rest = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)


@_rest.get("/{path:path}")
def unknown_page(request: Request, path: str) -> Response:
    raise NotFound("there is no such page")


ROUTERS = (
    *(router, sign_in.router, new_job.router, job_data.router, embedding_maps.router, jobs.router),
    *(sweeps.router, encoders.router, deployments.router, lab.router, operations.router),
    *(projects.router, retention.router, activity.router, _rest),
)
"""All routers, in the order in which their paths are matched."""
