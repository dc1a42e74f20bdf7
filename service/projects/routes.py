"""Routes /v1/projects, /v1/usage and /v1/audit: policies of projects, the hours that jobs used, and users' changes."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from service.auth.authentication import Admin, Reader
from service.db.models import ProjectSettings
from service.projects.audit import AuditFilter, AuditLog
from service.projects.schemas import (
    AuditPage,
    AuditView,
    ProjectList,
    ProjectPolicy,
    ProjectView,
    UsageGroup,
    UsageList,
    UsageView,
)
from service.projects.storage import GIB, StoredBytesStore
from service.projects.store import ProjectStore, policy_of
from service.projects.usage import ResourceHours, UsageStore, start_of_month
from service.web.parameters import CURSOR, PageSize, ProjectFilter, Timestamp
from service.web.schemas import Project, utc_datetime

router = APIRouter(tags=["projects"])

ProjectName = Annotated[Project, Path(description="Name of the project.")]


@router.get("/projects", summary="List projects")
def list_projects(request: Request, caller: Admin) -> ProjectList:
    """List the projects that have a policy, with their usage in the current month.

    Projects without one have the service's defaults, a share of 1 and no budgets.
    """
    month, stored = _usage_this_month(request, caller.project), _stored(request)
    found = _projects(request).list(caller.project)
    return ProjectList(items=[_view(project, month, stored) for project in found])


@router.get("/projects/{project}", summary="Get a project")
def get_project(request: Request, caller: Admin, project: ProjectName) -> ProjectView:
    found = _projects(request).get(project, caller.project)
    return _view(found, _usage_this_month(request, project), _stored(request))


@router.put("/projects/{project}", summary="Create a project, or replace its policy")
def put_project(request: Request, caller: Admin, project: ProjectName, body: ProjectPolicy) -> ProjectView:
    """Requires an admin key that covers all projects.

    Jobs beyond a quota wait; a deployment beyond one is rejected. What already runs is not stopped.
    """
    caller.require_all_projects()
    stored = _projects(request).put(project, body, caller.id)
    return _view(stored, _usage_this_month(request, project), _stored(request))


@router.get("/usage", summary="Get the hours for which jobs reserved resources")
def get_usage(
    request: Request,
    caller: Reader,
    by: Annotated[UsageGroup, Query(description="What to sum up by. sweep: searches only.")] = "project",
    since: Annotated[
        Timestamp | None, Query(description="Start of the period. Default: start of the month (UTC).")
    ] = None,
    until: Annotated[Timestamp | None, Query(description="End of the period. Default: now.")] = None,
    project: ProjectFilter = None,
    limit: PageSize = 50,
) -> UsageList:
    """Running jobs count up to now, and deleted jobs too."""
    end = min(until.timestamp(), time.time()) if until else time.time()
    start = min(end, since.timestamp() if since else start_of_month(end))
    rows = UsageStore(request.app.state.engine).rows(by, start, end, caller.own_project(project))
    items = [
        UsageView(key=row.key, project=row.project, gpu_hours=row.hours.gpus, cpu_hours=row.hours.cpus, jobs=row.jobs)
        for row in rows[:limit]
    ]
    return UsageList(
        since=utc_datetime(start),
        until=utc_datetime(end),
        items=items,
        gpu_hours=sum(row.hours.gpus for row in rows),
        cpu_hours=sum(row.hours.cpus for row in rows),
    )


@router.get("/audit", summary="List changes made by users, newest first")
def list_changes(
    request: Request,
    caller: Admin,
    target: Annotated[
        str | None, Query(max_length=200, description="ID or name of the changed object. Default: all objects.")
    ] = None,
    actor: Annotated[
        str | None, Query(max_length=100, description="ID of the key or token that made the change. Default: all.")
    ] = None,
    since: Annotated[Timestamp | None, Query(description="Earliest time of a change.")] = None,
    until: Annotated[Timestamp | None, Query(description="Time before which changes are listed.")] = None,
    project: ProjectFilter = None,
    cursor: Annotated[str | None, Query(max_length=300, description=CURSOR)] = None,
    limit: PageSize = 50,
) -> AuditPage:
    """Changes to jobs, encoders, aliases, deployments, keys, console links, webhooks and projects."""
    bounds = (since.timestamp() if since else None, until.timestamp() if until else None)
    where = AuditFilter(caller.own_project(project), target, actor, *bounds)
    found, next_cursor = AuditLog(request.app.state.engine).list(where, cursor, limit)
    items = [
        AuditView(
            at=utc_datetime(entry.at),
            **{name: getattr(entry, name) for name in ("id", "actor", "project", "action", "target", "outcome")},
        )
        for entry in found
    ]
    return AuditPage(items=items, next_cursor=next_cursor)


def _projects(request: Request) -> ProjectStore:
    return ProjectStore(request.app.state.engine)


def _usage_this_month(request: Request, project: str | None) -> dict[str, ResourceHours]:
    now = time.time()
    return UsageStore(request.app.state.engine).by_project(start_of_month(now), now, project)


def _stored(request: Request) -> dict[str, int]:
    return StoredBytesStore(request.app.state.engine).by_project()


def _view(project: ProjectSettings, month: dict[str, ResourceHours], stored: dict[str, int]) -> ProjectView:
    hours = month.get(project.name, ResourceHours())
    return ProjectView(
        **policy_of(project).model_dump(),
        name=project.name,
        gpu_hours=hours.gpus,
        cpu_hours=hours.cpus,
        stored_gib=stored.get(project.name, 0) / GIB,
        created_at=utc_datetime(project.created_at),
        changed_at=utc_datetime(project.changed_at),
        changed_by=project.changed_by,
    )
