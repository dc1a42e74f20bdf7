"""The retention policy: how long each kind of data is kept. By default, user data is kept forever."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from service.settings import Settings
from service.web.schemas import ApiModel, not_a_boolean

Days = Annotated[float, Field(gt=0, le=36500), BeforeValidator(not_a_boolean)]

RemovalKind = Literal["jobs", "trials", "logs", "checkpoints", "orphans", "history", "deliveries", "idempotency_keys"]
"""Kinds of data that garbage collection removes, in the order in which it considers them."""


class RetentionPolicy(ApiModel):
    """Number of days to keep each kind of data; null: forever.

    Anything that an encoder's card, an alias, a deployment or an unfinished job refers to is always kept.
    """

    jobs_days: Days | None = None
    """Days to keep a job after it ends, with its run, trials, log and output."""
    trials_days: Days | None = None
    """Days to keep the runs of a sweep's trials after the sweep ends. The sweep's report and ledger are kept."""
    logs_days: Days | None = None
    """Days to keep a log after its job or run ends."""
    checkpoints_days: Days | None = None
    """Days to keep a run's checkpoints after it ends. Without them, the run cannot be continued."""
    orphans_days: Days | None = None
    """Days to keep incomplete files that nothing will complete: uncommitted checkpoints, encoders without a card, runs
    that never started, temporary files, and remains of deleted jobs."""
    history_days: Days | None = None
    """Days to keep the records of deleted jobs, encoders and deployments, with the jobs' events."""
    deliveries_days: Days | None = None
    """Days to keep finished webhook deliveries."""

    @property
    def removes_user_data(self) -> bool:
        """Whether the policy limits anything besides webhook deliveries, which the service removes on its own."""
        return any(value is not None for name, value in self if name != "deliveries_days")


def policy_of(settings: Settings) -> RetentionPolicy:
    """Return the policy defined by the `AMD_RETAIN_*` settings."""
    return RetentionPolicy(**{name: getattr(settings, f"retain_{name}") for name in RetentionPolicy.model_fields})
