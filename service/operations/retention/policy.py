"""The retention policy: for how long each kind of data is kept. By default, user data is kept forever."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from service.settings import Settings
from service.web.schemas import ApiModel, not_a_boolean

Days = Annotated[float, Field(gt=0, le=36500), BeforeValidator(not_a_boolean)]

RemovalKind = Literal["jobs", "trials", "logs", "checkpoints", "orphans", "history", "deliveries", "idempotency_keys"]
"""Kinds of data that garbage collection removes, in the order in which it considers them."""


class RetentionPolicy(ApiModel):
    """Number of days for which each kind of data is kept; null: forever.

    Whatever an encoder's card, an alias, a deployment or an unfinished job refers to is kept in any case.
    """

    jobs_days: Days | None = None
    """Days after its end for which a job is kept, with its run, trials, log and output."""
    trials_days: Days | None = None
    """Days after the end of a sweep for which its trials' runs are kept. The sweep's report and ledger are kept."""
    logs_days: Days | None = None
    """Days after the end of a job or run for which its log is kept."""
    checkpoints_days: Days | None = None
    """Days after the end of a run for which its checkpoints are kept. Without them it cannot be continued."""
    orphans_days: Days | None = None
    """Days for which incomplete files that nothing will complete are kept: uncommitted checkpoints, encoders without a
    card, runs that never started, temporary files, and remains of deleted jobs."""
    history_days: Days | None = None
    """Days for which the records of deleted jobs, encoders and deployments are kept, with the jobs' events."""
    deliveries_days: Days | None = None
    """Days for which finished webhook deliveries are kept."""

    @property
    def removes_user_data(self) -> bool:
        """Whether the policy limits more than webhook deliveries, which the service removes by itself."""
        return any(value is not None for name, value in self if name != "deliveries_days")


def policy_of(settings: Settings) -> RetentionPolicy:
    """Return the policy of the settings `AMD_RETAIN_*`."""
    return RetentionPolicy(**{name: getattr(settings, f"retain_{name}") for name in RetentionPolicy.model_fields})
