"""Route /v1/cluster: the cluster's resources and nodes, which jobs use them, and which jobs wait for them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from fastapi import APIRouter, Request

from service.auth.authentication import Principal, Reader
from service.db.models import Deployment, Job
from service.jobs.execution.ray_jobs import Cluster
from service.jobs.execution.ray_nodes import Node
from service.jobs.execution.reconciler import submission_id
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


class NodeView(ApiModel):
    """A node of the cluster."""

    name: str
    address: str
    """IP address of the node."""
    head: bool
    """Whether Ray's head process runs on the node."""
    state: Literal["alive", "lost"]
    """State of the node; nodes that were lost are listed for an hour."""
    message: str
    """Reason why the node was lost; empty if it is alive."""
    cpus: float
    used_cpus: float | None
    """CPUs in use; null if Ray does not report it for this node."""
    gpus: float
    used_gpus: float | None
    """GPUs in use; null if Ray does not report it for this node."""
    memory_bytes: float
    """Memory that Ray may allocate on the node."""
    jobs: list[str]
    """IDs of the jobs with a process on the node, in the caller's projects."""
    deployments: list[str]
    """Names of the deployments with a replica on the node, in the caller's projects."""
    others: int
    """Number of jobs and deployments in other projects that use the node."""


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
    nodes: list[NodeView]
    """Nodes of the cluster, the head first; empty if the cluster is not responding."""
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
    nodes: list[NodeView] = []
    active = jobs.in_states(ACTIVE)
    submissions = {submission_id(job, job.attempt): job for job in active if job.attempt}
    try:
        found = calls.run_from_thread(cluster.capacity)
        resources = ResourcesView(
            cpus=found.cpus,
            used_cpus=found.used_cpus,
            gpus=found.gpus,
            used_gpus=found.used_gpus,
            largest_memory_bytes=found.memory,
        )
        deployments: dict[str, Deployment] = request.app.state.deployments.applications()
        listed = calls.run_from_thread(cluster.nodes, submissions.keys())
        nodes = [_node(node, submissions, deployments, caller.project) for node in listed]
    except ClusterUnavailable as error:
        problem = error.message
    return ClusterView(
        resources=resources,
        problem=problem,
        nodes=nodes,
        running=[_occupant(job, caller.project) for job in active[:max_running]],
        waiting=[_occupant(job, caller.project) for job in jobs.in_states(WAITING, limit=max_waiting)],
    )


def _node(
    node: Node, submissions: Mapping[str, Job], deployments: Mapping[str, Deployment], project: str | None
) -> NodeView:
    jobs = [submissions[one] for one in sorted(node.submissions) if one in submissions]
    serving = [deployments[one] for one in sorted(node.applications) if one in deployments]
    own_jobs = [job.id for job in jobs if project in (None, job.project)]
    own_deployments = [one.name for one in serving if project in (None, one.project)]
    return NodeView(
        head=node.is_head,
        memory_bytes=node.memory,
        jobs=own_jobs,
        deployments=own_deployments,
        others=len(jobs) + len(serving) - len(own_jobs) - len(own_deployments),
        **{
            name: getattr(node, name)
            for name in ("name", "address", "state", "message", "cpus", "used_cpus", "gpus", "used_gpus")
        },
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
