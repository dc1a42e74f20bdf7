"""Operations pages: the cluster and its queue, failures by reason, keys and webhooks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, get_args

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.auth import api_keys
from service.auth.authentication import SCOPES, Admin, Reader
from service.auth.sessions import PREFIX
from service.console.forms import FormDep, parse
from service.console.rendering import redirect, render
from service.console.security import ConsoleRoute
from service.jobs import routes as jobs_api
from service.jobs.execution.backfill import Usage
from service.jobs.routes import Config, Jobs
from service.jobs.schemas import ACTIVE, WAITING, JobView
from service.jobs.store import JobFilter, JobStore
from service.operations.cluster import ClusterView, cluster_view
from service.serving.deployments import DeploymentStore
from service.serving.reservations import running_reservation
from service.web.schemas import utc_datetime
from service.webhooks import routes as webhooks_api

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

FAILURES = 200  # maximum number of failures that are grouped, newest first
DELIVERIES = 20
EVENTS: tuple[str, ...] = tuple(
    dict.fromkeys(event for group in get_args(webhooks_api.EventType) for event in get_args(group))
)
"""Types of the job events that webhooks deliver."""
OCCUPANTS = 50  # maximum number of running and of waiting jobs on the cluster page


class FailureGroup(NamedTuple):
    """Failed jobs with the same reason."""

    reason: str
    jobs: list[JobView]
    ranks: list[tuple[int, int]]
    """Ranks that failed first in these jobs, each with its number of failures, in descending order."""


@router.get("/cluster")
def show_cluster(request: Request, caller: Reader, jobs: Jobs) -> Response:
    counts = jobs.facets(JobFilter(origin="api"))["state"]
    cluster = cluster_view(request, caller, jobs, OCCUPANTS, OCCUPANTS)
    return render(
        request,
        "cluster.html",
        cluster=cluster,
        names=jobs.names({job for node in cluster.nodes for job in node.jobs}),
        reserved=_reserved(cluster, jobs, request.app.state.deployments),
        running=sum(counts.get(state, 0) for state in ACTIVE),
        waiting=sum(counts.get(state, 0) for state in WAITING),
    )


def _reserved(cluster: ClusterView, jobs: JobStore, deployments: DeploymentStore) -> Usage:
    """Return the resources that jobs and deployments reserve, or what Ray reports as used if that is more.

    Ray reports what running programs hold, with a delay: not what starting jobs are about to hold.
    """
    active, held = jobs.in_states(ACTIVE), running_reservation(deployments)()
    cpus = held.cpus + sum(job.cpus for job in active)
    gpus = held.gpus + sum(attempt.gpus for attempt in jobs.newest_attempts(active).values())
    used = cluster.resources
    return Usage(cpus, gpus) if used is None else Usage(max(cpus, used.used_cpus), max(gpus, used.used_gpus))


@router.get("/failures")
def show_failures(
    request: Request, caller: Reader, jobs: Jobs, settings: Config, days: Annotated[int, Query(ge=1, le=365)] = 7
) -> Response:
    since = utc_datetime(time.time() - days * 86400)
    page = jobs_api.list_jobs(caller, jobs, settings, state=["failed"], since=since, limit=FAILURES)
    return render(
        request, "failures.html", groups=failure_groups(page.items), days=days, more=page.next_cursor is not None
    )


def failure_groups(jobs: Iterable[JobView]) -> list[FailureGroup]:
    """Group failed jobs by reason, most frequent first."""
    groups: dict[str, list[JobView]] = {}
    for job in jobs:
        groups.setdefault(job.reason or "unknown", []).append(job)
    return [
        FailureGroup(
            reason,
            found,
            Counter(job.failure.rank for job in found if job.failure and job.failure.rank is not None).most_common(5),
        )
        for reason, found in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]


@router.get("/keys")
def show_keys(request: Request, caller: Admin) -> Response:
    return render(request, "keys.html", keys=api_keys.list_keys(request, caller).items, scopes=SCOPES, new=None)


@router.post("/keys")
def create_key(request: Request, caller: Admin, form: FormDep) -> Response:
    """Create a key, show it once, and update the table of keys."""
    values = {"name": form.text("name"), "scopes": [form.text("scope")], "project": form.text("project") or None}
    new = api_keys.create_key(request, caller, parse(api_keys.KeyRequest, values), Response())
    keys = api_keys.list_keys(request, caller).items
    return render(request, "fragments/new_key.html", keys=keys, new=new)


@router.post("/keys/{key_id}/revoke")
async def revoke_key(request: Request, caller: Admin, key_id: api_keys.KeyId) -> Response:
    await api_keys.revoke_key(request, caller, key_id)
    return redirect(request, f"{PREFIX}/keys")


@router.get("/webhooks")
def show_webhooks(request: Request, caller: Admin) -> Response:
    return render(request, "webhooks.html", **_webhooks(request, caller), events=EVENTS, new=None)


@router.post("/webhooks")
def create_webhook(request: Request, caller: Admin, form: FormDep) -> Response:
    """Create a webhook, show its secret once, and update the list of webhooks."""
    values = {"url": form.text("url"), "events": form.texts("events"), "project": form.text("project") or None}
    new = webhooks_api.create_webhook(request, caller, parse(webhooks_api.WebhookRequest, values), Response())
    return render(request, "fragments/new_webhook.html", **_webhooks(request, caller), new=new)


def _webhooks(request: Request, caller: Admin) -> dict[str, Any]:
    """Return the template context of the list of webhooks."""
    webhooks = webhooks_api.list_webhooks(request, caller).items
    deliveries = {one.id: webhooks_api.list_deliveries(request, caller, one.id, DELIVERIES).items for one in webhooks}
    return {"webhooks": webhooks, "deliveries": deliveries}


@router.post("/webhooks/{webhook_id}/test")
def test_webhook(request: Request, caller: Admin, webhook_id: webhooks_api.WebhookId) -> Response:
    webhooks_api.test_webhook(request, caller, webhook_id)
    return redirect(request, f"{PREFIX}/webhooks")


@router.post("/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver")
def redeliver(
    request: Request, caller: Admin, webhook_id: webhooks_api.WebhookId, delivery_id: webhooks_api.DeliveryId
) -> Response:
    webhooks_api.redeliver(request, caller, webhook_id, delivery_id)
    return redirect(request, f"{PREFIX}/webhooks")


@router.post("/webhooks/{webhook_id}/delete")
def delete_webhook(request: Request, caller: Admin, webhook_id: webhooks_api.WebhookId) -> Response:
    webhooks_api.delete_webhook(request, caller, webhook_id)
    return redirect(request, f"{PREFIX}/webhooks")
