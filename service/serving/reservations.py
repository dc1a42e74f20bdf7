"""Cluster resources reserved by deployments.

A deployment reserves the CPUs and GPUs of its running replicas, or of its minimum number of replicas if fewer are
running. Replicas beyond the minimum start on resources that jobs leave idle, and reserve them only while running.
Quotas count the maximum number of replicas. Does not call Ray.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from sqlalchemy import Engine, Select, and_, func, select
from sqlalchemy.orm import Session

from service.db.models import Attempt, Deployment, Job
from service.jobs.execution.backfill import Usage
from service.jobs.execution.ray_jobs import Capacity
from service.jobs.schemas import ACTIVE
from service.projects.schemas import ProjectUse
from service.projects.store import locked_policy
from service.serving.deployments import DeploymentStore
from service.serving.schemas import ServingSettings
from service.web.errors import InfeasibleDeployment, QuotaExceeded


def running_reservation(store: DeploymentStore) -> Callable[[], Usage]:
    """Return a function that computes the resources that all deployments currently reserve."""

    def compute() -> Usage:
        return _sum((one, max(_settings(one).replicas.min, one.replicas)) for one in store.all())

    return compute


def deployed_gpus(store: DeploymentStore) -> Callable[[], Mapping[str, float]]:
    """Return a function that computes, by project, the number of GPUs of deployments at their maximum size."""

    def compute() -> Mapping[str, float]:
        found = defaultdict[str, float](float)
        for one in store.all():
            found[one.project] += _max_gpus(one)
        return found

    return compute


def projects_in_use(engine: Engine) -> Callable[[], Mapping[str, ProjectUse]]:
    """Return a function that computes the resources that count towards each project's quotas."""

    def compute() -> Mapping[str, ProjectUse]:
        with Session(engine.execution_options(reads_only=True)) as session:
            jobs = {
                project: (count, workers, gpus) for project, count, workers, gpus in session.execute(_active_jobs())
            }
        deployments = defaultdict[str, list[Deployment]](list)
        for one in DeploymentStore(engine).all():
            deployments[one.project].append(one)
        return {
            project: _use(*jobs.get(project, (0, 0, 0.0)), deployments[project]) for project in {*jobs, *deployments}
        }

    return compute


def _use(running_jobs: int, workers: int, gpus: float, deployments: list[Deployment]) -> ProjectUse:
    return ProjectUse(
        running_jobs=running_jobs,
        workers=workers,
        gpus=gpus + sum(map(_max_gpus, deployments)),
        deployments=len(deployments),
        replicas=sum(map(_max_replicas, deployments)),
    )


def check_quotas(session: Session, desired: Deployment) -> None:
    """Raise QuotaExceeded if a deployment exceeds its project's quotas. Locks them until the end of the transaction.

    An update that needs no more than before is permitted, even if the quota has been lowered since.
    """
    project, policy = desired.project, locked_policy(session, desired.project)
    found = list(session.scalars(select(Deployment).where(Deployment.project == project)))
    others = [one for one in found if one.name != desired.name]
    before = [one for one in found if one.name == desired.name]
    jobs = _gpus_of_jobs(session, project) if policy.max_gpus is not None else 0.0
    quotas: tuple[tuple[str, str, Callable[[Deployment], float], float], ...] = (
        ("name", "max_deployments", lambda _: 1.0, 0.0),
        ("replicas.max", "max_replicas", _max_replicas, 0.0),
        ("gpus", "max_gpus", _max_gpus, jobs),
    )
    for field, quota, count, used_by_jobs in quotas:
        limit, needed, used = getattr(policy, quota), count(desired), used_by_jobs + sum(map(count, others))
        if limit is not None and used + needed > limit and needed > sum(map(count, before)):
            message = (
                f"{field}: the deployment needs {needed:g} of project {project}'s {quota}={limit:g}, and "
                f"{used:g} are in use; lower replicas.max or gpus, delete a deployment, or ask for a larger quota"
            )
            raise QuotaExceeded(message, field=field, quota=quota, needed=needed, used=used, limit=limit)


def _active_jobs() -> Select[str, int, int, float]:
    """Return the query for each project's active jobs: number of jobs, workers, and GPUs of attempts."""
    newest = and_(Attempt.job_id == Job.id, Attempt.number == Job.attempt)
    gpus = func.coalesce(func.sum(Attempt.gpus), 0.0)
    query = select(Job.project, func.count(), func.sum(Job.workers), gpus).outerjoin(Attempt, newest)
    return query.where(Job.state.in_(ACTIVE), Job.origin == "api").group_by(Job.project)


def _gpus_of_jobs(session: Session, project: str) -> float:
    found = session.execute(_active_jobs().where(Job.project == project)).first()
    return found[3] if found is not None else 0.0


def _max_replicas(deployment: Deployment) -> int:
    replicas = _settings(deployment).replicas
    return max(replicas.min, replicas.max)


def _max_gpus(deployment: Deployment) -> float:
    return _max_replicas(deployment) * _settings(deployment).gpus


def check_fits(desired: Deployment, others: Iterable[Deployment], capacity: Capacity) -> None:
    """Raise InfeasibleDeployment unless the minimum number of replicas of every deployment fits in the cluster.

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
