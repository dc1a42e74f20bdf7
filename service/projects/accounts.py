"""Project policies and usage, as read by the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import Engine

from service.projects.schemas import ProjectPolicy
from service.projects.storage import StoredBytesStore
from service.projects.store import ProjectStore
from service.projects.usage import HOUR_S, CachedUsage, ResourceHours, start_of_month

FAIR_SHARE_S = 24 * HOUR_S  # length of the period whose usage counts in fair scheduling


class ProjectAccounts(NamedTuple):
    """Policies and usage by project; projects without an entry have the default policy and no usage."""

    policies: Mapping[str, ProjectPolicy] = {}
    recent: Mapping[str, ResourceHours] = {}
    """Usage in the last FAIR_SHARE_S seconds."""
    month: Mapping[str, ResourceHours] = {}
    """Usage in the current calendar month (UTC)."""
    deployed_gpus: Mapping[str, float] = {}
    """Number of GPUs of deployments, counted at their maximum number of replicas."""
    stored: Mapping[str, int] = {}
    """Bytes under the storage root, as last measured."""

    def policy(self, project: str) -> ProjectPolicy:
        return self.policies.get(project) or ProjectPolicy()


class AccountReader:
    """Reads accounts from the database. Usage is at most REFRESH_S old."""

    def __init__(self, engine: Engine) -> None:
        self._projects, self._storage = ProjectStore(engine), StoredBytesStore(engine)
        self._recent = CachedUsage(engine, lambda now: now - FAIR_SHARE_S)
        self._month = CachedUsage(engine, start_of_month)

    def read(self, now: float, deployed_gpus: Mapping[str, float]) -> ProjectAccounts:
        recent, month = self._recent.by_project(now), self._month.by_project(now)
        return ProjectAccounts(self._projects.policies(), recent, month, deployed_gpus, self._storage.by_project())
