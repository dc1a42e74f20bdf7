"""Routes /v1/projects, /v1/usage, /v1/events and /v1/audit: project policies, hours used, events and changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from service.auth.authentication import Admin, Reader
from service.db.models import ProjectSettings
from service.projects.activity import ActivityFeed, ActivityFilter
from service.projects.audit import AuditFilter, AuditLog
from service.projects.schemas import (
    ActivityPage,
    AuditPage,
    AuditView,
    ProjectList,
    ProjectPolicy,
    ProjectUse,
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

ACTION_PATTERN = r"^[a-z]{1,20}(\.[a-z_]{1,40})?$"
ACTIVITY_PATTERN = r"^(job|deployment|alias|encoder)(\.[a-z_]{1,40})?$"
ProjectName = Annotated[Project, Path(description="Name of the project.")]


@router.get("/projects", summary="List projects")
def list_projects(request: Request, caller: Admin) -> ProjectList:
    """List the projects that have a policy, with their usage in the current month.

    Projects without a policy have the service's default quotas, a share of 1 and no budgets.
    """
    found = _projects(request).list(caller.project)
    return ProjectList(items=_views(request, found, caller.project))


@router.get("/projects/{project}", summary="Get a project")
def get_project(request: Request, caller: Admin, project: ProjectName) -> ProjectView:
    found = _projects(request).get(project, caller.project)
    return _views(request, [found], project)[0]


@router.put("/projects/{project}", summary="Create a project, or replace its policy")
def put_project(request: Request, caller: Admin, project: ProjectName, body: ProjectPolicy) -> ProjectView:
    """Requires an admin key that covers all projects.

    Jobs that would exceed a quota wait; deployments that would exceed one are rejected. Jobs and deployments that are
    already running are not stopped.
    """
    caller.require_all_projects()
    stored = _projects(request).put(project, body, caller.id)
    return _views(request, [stored], project)[0]


@router.get("/usage", summary="Get the GPU- and CPU-hours that jobs reserved")
def get_usage(
    request: Request,
    caller: Reader,
    by: Annotated[UsageGroup, Query(description="How to group the totals. sweep: searches only.")] = "project",
    since: Annotated[
        Timestamp | None, Query(description="Start of the period. Default: start of the month (UTC).")
    ] = None,
    until: Annotated[Timestamp | None, Query(description="End of the period. Default: now.")] = None,
    project: ProjectFilter = None,
    limit: PageSize = 50,
) -> UsageList:
    """Running jobs count up to the end of the period. Deleted jobs are included."""
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


@router.get("/events", summary="List project events, newest first")
def list_events(
    request: Request,
    caller: Reader,
    type: Annotated[
        list[Annotated[str, Query(pattern=ACTIVITY_PATTERN)]] | None,
        Query(
            max_length=20,
            description="Types such as `job.failed` or `alias.move`, or kinds: job, deployment, alias, encoder. "
            "Default: all types.",
        ),
    ] = None,
    since: Annotated[Timestamp | None, Query(description="Time from which events are listed.")] = None,
    project: ProjectFilter = None,
    cursor: Annotated[str | None, Query(max_length=300, description=CURSOR)] = None,
    limit: PageSize = 50,
) -> ActivityPage:
    """List job events, including those of deleted jobs, and users' changes to deployments, aliases and encoders."""
    where = ActivityFilter(caller.own_project(project), type or (), since.timestamp() if since else None)
    return ActivityFeed(request.app.state.engine).page(where, cursor, limit)


@router.get("/audit", summary="List changes made by users, newest first")
def list_changes(
    request: Request,
    caller: Admin,
    target: Annotated[
        str | None, Query(max_length=200, description="ID or name of the changed object. Default: all objects.")
    ] = None,
    action: Annotated[
        str | None,
        Query(
            pattern=ACTION_PATTERN,
            description="Object kind and verb, such as `job.cancel`, or only the kind. Default: all actions.",
        ),
    ] = None,
    actor: Annotated[
        str | None, Query(max_length=100, description="ID of the key or token that made the change. Default: all.")
    ] = None,
    since: Annotated[Timestamp | None, Query(description="Time from which changes are listed.")] = None,
    until: Annotated[Timestamp | None, Query(description="Time before which changes are listed.")] = None,
    project: ProjectFilter = None,
    cursor: Annotated[str | None, Query(max_length=300, description=CURSOR)] = None,
    limit: PageSize = 50,
) -> AuditPage:
    """List changes to jobs, encoders, aliases, deployments, keys, console links, webhooks and projects."""
    bounds = (since.timestamp() if since else None, until.timestamp() if until else None)
    where = AuditFilter(caller.own_project(project), target, action, actor, *bounds)
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


def _views(request: Request, projects: Sequence[ProjectSettings], visible: str | None) -> list[ProjectView]:
    now, state = time.time(), request.app.state
    month = UsageStore(state.engine).by_project(start_of_month(now), now, visible)
    in_use: Mapping[str, ProjectUse] = state.projects_in_use()
    stored = StoredBytesStore(state.engine).by_project()
    return [
        _view(
            each,
            in_use.get(each.name, ProjectUse()),
            month.get(each.name, ResourceHours()),
            stored.get(each.name, 0) / GIB,
        )
        for each in projects
    ]


def _view(project: ProjectSettings, in_use: ProjectUse, hours: ResourceHours, stored_gib: float) -> ProjectView:
    return ProjectView(
        **policy_of(project).model_dump(),
        name=project.name,
        in_use=in_use,
        gpu_hours=hours.gpus,
        cpu_hours=hours.cpus,
        stored_gib=stored_gib,
        created_at=utc_datetime(project.created_at),
        changed_at=utc_datetime(project.changed_at),
        changed_by=project.changed_by,
    )
