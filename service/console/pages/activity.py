"""The activity page: job events, and changes to deployments, aliases and encoders."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.auth.authentication import Reader
from service.auth.sessions import PREFIX
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.jobs.routes import Jobs
from service.projects import routes as projects_api

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

PAGE = 50
TYPES = {
    "": "Everything",
    "job": "Jobs",
    "job.failed": "Failed jobs",
    "job.succeeded": "Succeeded jobs",
    "deployment": "Deployments",
    "alias": "Aliases",
    "encoder": "Encoders",
}
"""Choices of the filter, with their labels."""


@router.get("/activity")
def show_activity(
    request: Request,
    caller: Reader,
    jobs: Jobs,
    type: Annotated[str, Query(pattern=rf"^$|{projects_api.ACTIVITY_PATTERN}")] = "",
    cursor: Annotated[str | None, Query(max_length=300)] = None,
) -> Response:
    chosen = {"type": type} if type else {}
    page = projects_api.list_events(request, caller, [type] if type else None, None, None, cursor or None, PAGE)
    return render(
        request,
        "activity.html",
        page=page,
        names=jobs.names({event.target for event in page.items if event.type.startswith("job.")}),
        type=type,
        types=TYPES,
        here=urlencode(chosen),
        is_newest=not cursor,
        older=urlencode({**chosen, "cursor": page.next_cursor}) if page.next_cursor else None,
    )
