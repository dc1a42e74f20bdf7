"""Policies and usage of projects, as the scheduler reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import Engine

from service.projects.schemas import ProjectPolicy
from service.projects.store import ProjectStore
from service.projects.usage import HOUR_S, ResourceHours, UsageStore, start_of_month

FAIR_SHARE_S = 24 * HOUR_S  # usage that counts in fair scheduling
REFRESH_S = 30.0  # usage changes slowly, and summing it reads every attempt of the month


class ProjectAccounts(NamedTuple):
    """Policies and usage by project; projects without an entry have the default policy and no usage."""

    policies: Mapping[str, ProjectPolicy] = {}
    recent: Mapping[str, ResourceHours] = {}
    """Usage in the last FAIR_SHARE_S seconds."""
    month: Mapping[str, ResourceHours] = {}
    """Usage in the calendar month (UTC)."""
    deployed_gpus: Mapping[str, float] = {}
    """GPUs of all replicas that deployments may start."""

    def policy(self, project: str) -> ProjectPolicy:
        return self.policies.get(project) or ProjectPolicy()


class AccountReader:
    """Reads accounts from the database. Usage is at most REFRESH_S old."""

    def __init__(self, engine: Engine) -> None:
        self._projects, self._usage = ProjectStore(engine), UsageStore(engine)
        self._recent, self._month = dict[str, ResourceHours](), dict[str, ResourceHours]()
        self._read_at = float("-inf")

    def read(self, now: float, deployed_gpus: Mapping[str, float]) -> ProjectAccounts:
        if not 0 <= now - self._read_at < REFRESH_S:
            self._recent = self._usage.by_project(now - FAIR_SHARE_S, now)
            self._month = self._usage.by_project(start_of_month(now), now)
            self._read_at = now
        return ProjectAccounts(self._projects.policies(), self._recent, self._month, deployed_gpus)
