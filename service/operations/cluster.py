"""Route /v1/cluster: the cluster's resources, which jobs use them, and which jobs wait for them."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter, Request

from service.auth.authentication import Principal, Reader
from service.db.models import Job
from service.jobs.execution.ray_jobs import Cluster
from service.jobs.routes import Jobs
from service.jobs.schemas import ACTIVE, WAITING
from service.jobs.store import JobStore
from service.web.bounded_calls import BoundedCalls
from service.web.errors import ClusterUnavailable
from service.web.schemas import ApiModel, utc_datetime, utc_datetime_or_none

router = APIRouter(tags=["operations"])

MAX_WAITING = 500


class ResourcesView(ApiModel):
    """Resources of all nodes."""

    cpus: float
    used_cpus: float
    gpus: float
    used_gpus: float
    largest_memory_bytes: float
    """Memory of the largest node."""


class OccupantView(ApiModel):
    """A job that uses the cluster or is waiting for it."""

    job: str | None
    """ID of the job; null for a job in another project."""
    name: str | None
    kind: str
    state: str
    project: str | None
    """Project of the job; null for a job in another project."""
    workers: int
    cpus: float
    device: str
    priority: int
    message: str
    """Explanation of why the job is waiting."""
    created_at: datetime
    started_at: datetime | None


class ClusterView(ApiModel):
    """The cluster and its queue."""

    resources: ResourcesView | None
    """Resources of the cluster; null if it is not responding."""
    problem: str
    """Explanation of why the cluster is not responding; empty if it is responding."""
    running: list[OccupantView]
    waiting: list[OccupantView]
    """Waiting jobs: highest priority first, then oldest; at most 500. Fair shares decide between projects."""


@router.get("/cluster", summary="Get the cluster's resources and queue")
def get_cluster(request: Request, caller: Reader, jobs: Jobs) -> ClusterView:
    """Jobs in other projects are listed without their IDs and names."""
    return cluster_view(request, caller, jobs, None, MAX_WAITING)


def cluster_view(
    request: Request, caller: Principal, jobs: JobStore, max_running: int | None, max_waiting: int
) -> ClusterView:
    """Return the cluster's resources and at most this many running and waiting jobs."""
    cluster: Cluster = request.app.state.cluster
    calls: BoundedCalls = request.app.state.ray_calls
    resources, problem = None, ""
    try:
        found = calls.run_from_thread(cluster.capacity)
        resources = ResourcesView(
            cpus=found.cpus,
            used_cpus=found.used_cpus,
            gpus=found.gpus,
            used_gpus=found.used_gpus,
            largest_memory_bytes=found.memory,
        )
    except ClusterUnavailable as error:
        problem = error.message
    return ClusterView(
        resources=resources,
        problem=problem,
        running=[_occupant(job, caller.project) for job in jobs.in_states(ACTIVE, limit=max_running)],
        waiting=[_occupant(job, caller.project) for job in jobs.in_states(WAITING, limit=max_waiting)],
    )


def _occupant(job: Job, project: str | None) -> OccupantView:
    own = project in (None, job.project)
    return OccupantView(
        job=job.id if own else None,
        name=job.name if own else None,
        project=job.project if own else None,
        message=job.message if own else "",
        created_at=utc_datetime(job.created_at),
        started_at=utc_datetime_or_none(job.started_at),
        **{field: getattr(job, field) for field in ("kind", "state", "workers", "cpus", "device", "priority")},
    )
