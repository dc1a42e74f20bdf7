"""Cluster resources reserved by deployments: CPUs and GPUs of the running replicas, or of the minimum number of
replicas if fewer are running.

Replicas beyond the minimum start on resources that jobs leave idle, and reserve them only while running. Does not call
Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from service.db.models import Deployment
from service.jobs.execution.admission import Usage
from service.jobs.execution.ray_jobs import Capacity
from service.serving.deployments import DeploymentStore
from service.serving.schemas import ServingSettings
from service.web.errors import InfeasibleDeployment


def running_reservation(store: DeploymentStore) -> Callable[[], Usage]:
    """Return a function that computes the resources that all deployments currently reserve."""

    def compute() -> Usage:
        return _sum((one, max(_settings(one).replicas.min, one.replicas)) for one in store.all())

    return compute


def check_fits(desired: Deployment, others: Iterable[Deployment], capacity: Capacity) -> None:
    """Raise InfeasibleDeployment unless the minimum replicas of all deployments fit in the cluster.

    `others` may contain an earlier version of the deployment. Jobs are ignored, since replicas can wait for them to
    end.
    """
    settings = _settings(desired)
    rest = _sum((one, _settings(one).replicas.min) for one in others if one.name != desired.name)
    least = max(1, settings.replicas.min)  # a deployment that scales to zero must be able to start again
    for field, each, reserved, total in (
        ("cpus", settings.cpus, rest.cpus, capacity.cpus),
        ("gpus", settings.gpus, rest.gpus, capacity.gpus),
    ):
        if each and reserved + least * each > total:
            kind = field.upper().removesuffix("S") + "s"
            message = (
                f"{field}={each:g}: {least} x {each:g} {kind} do not fit: the cluster has {total:g} {kind}, of which "
                f"the minimum replicas of other deployments reserve {reserved:g}; lower {field} or "
                "replicas.min, delete a deployment, or add nodes"
            )
            raise InfeasibleDeployment(message, field=field, needed=least * each, reserved=reserved, total=total)


def _settings(deployment: Deployment) -> ServingSettings:
    return ServingSettings.model_validate(deployment.settings)


def _sum(replicas: Iterable[tuple[Deployment, int]]) -> Usage:
    cpus = gpus = 0.0
    for deployment, count in replicas:
        settings = _settings(deployment)
        cpus, gpus = cpus + count * settings.cpus, gpus + count * settings.gpus
    return Usage(cpus, gpus)
