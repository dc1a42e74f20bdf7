"""Project pages: usage and quotas, and the audit log."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import groupby
from typing import Annotated, Any, NamedTuple, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.auth.authentication import Admin, Reader
from service.auth.sessions import PREFIX
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.jobs.routes import Config, Jobs
from service.projects import audit
from service.projects import routes as projects_api
from service.projects.schemas import ProjectView, UsageGroup
from service.settings import Settings
from service.web.formats import now

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

ROWS = 200  # maximum number of rows in a month's usage table
PAGE = 50
ACTIONS = {kind: tuple(found) for kind, found in groupby(audit.ACTIONS, lambda action: action.partition(".")[0])}
"""Actions in the audit log, by the kind of their target."""
GROUPS: tuple[UsageGroup, ...] = get_args(UsageGroup)


class Meter(NamedTuple):
    """A quota or budget, and how much of it is used."""

    name: str
    used: float
    limit: float | None
    """None: no limit."""
    is_hours: bool = False


def meters_of(project: ProjectView, settings: Settings) -> list[Meter]:
    """Return a project's quotas and budgets, falling back to the service's limits where the project sets none."""
    use = project.in_use
    return [
        Meter("Jobs", use.running_jobs, _first(project.max_running_jobs, settings.project_max_running)),
        Meter("Workers", use.workers, _first(project.max_workers, settings.project_max_workers)),
        Meter("GPUs", use.gpus, project.max_gpus),
        Meter("Deployments", use.deployments, project.max_deployments),
        Meter("Replicas", use.replicas, project.max_replicas),
        Meter("GPU time", project.gpu_hours, project.gpu_hours_per_month, is_hours=True),
        Meter("CPU time", project.cpu_hours, project.cpu_hours_per_month, is_hours=True),
    ]


def _first(*limits: float | None) -> float | None:
    return next((limit for limit in limits if limit is not None), None)


class Month(NamedTuple):
    """A calendar month (UTC)."""

    year: int
    month: int

    @classmethod
    def parse(cls, text: str) -> Month:
        """Parse a month such as `2026-11`; an empty string means the current month."""
        if not text:
            return cls(now().year, now().month)
        year, _, month = text.partition("-")
        return cls(int(year), int(month))

    def plus(self, months: int) -> Month:
        index = self.year * 12 + self.month - 1 + months
        return Month(index // 12, index % 12 + 1)

    @property
    def start(self) -> datetime:
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    def __str__(self) -> str:
        return f"{self.year}-{self.month:02d}"


@router.get("/usage")
def show_usage(
    request: Request,
    caller: Reader,
    settings: Config,
    jobs: Jobs,
    month: Annotated[str, Query(pattern=r"^(20[0-9]{2}-(0[1-9]|1[0-2]))?$")] = "",
    by: UsageGroup = "project",
) -> Response:
    chosen = Month.parse(month)
    usage = projects_api.get_usage(request, caller, by, chosen.start, chosen.plus(1).start, None, ROWS)
    projects = projects_api.list_projects(request, caller).items if caller.allowed("admin") else []
    return render(
        request,
        "usage.html",
        projects=[(project, meters_of(project, settings)) for project in projects],
        usage=usage,
        names=jobs.names([row.key for row in usage.items]) if by in ("job", "sweep") else {},
        by=by,
        groups=GROUPS,
        month=chosen,
        is_current=chosen.plus(1).start > now(),
    )


@router.get("/audit")
def show_audit(
    request: Request,
    caller: Admin,
    jobs: Jobs,
    action: Annotated[str, Query(pattern=rf"^$|{projects_api.ACTION_PATTERN}")] = "",
    actor: Annotated[str, Query(max_length=100)] = "",
    target: Annotated[str, Query(max_length=200)] = "",
    cursor: Annotated[str | None, Query(max_length=300)] = None,
) -> Response:
    chosen = {"action": action, "actor": actor.strip(), "target": target.strip()}
    filters: dict[str, Any] = {name: value or None for name, value in chosen.items()}
    page = projects_api.list_changes(request, caller, **filters, cursor=cursor or None, limit=PAGE)
    filtered = {name: value for name, value in chosen.items() if value}
    return render(
        request,
        "audit.html",
        page=page,
        names=jobs.names({entry.target for entry in page.items if entry.action.startswith("job.")}),
        actions=ACTIONS,
        chosen=chosen,
        filtered=bool(filtered),
        newest=urlencode(filtered) if cursor else None,
        older=urlencode({**filtered, "cursor": page.next_cursor}) if page.next_cursor else None,
    )
