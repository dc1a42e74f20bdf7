"""Request and response models for projects, usage, events and audit entries."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from amd.storage import check_reference, normalized_url
from service.web.schemas import ApiModel, Priority, not_a_boolean

MAX_QUOTA = 10**6
Quota = Annotated[int, Field(ge=0, le=MAX_QUOTA), BeforeValidator(not_a_boolean)]
Amount = Annotated[float, Field(ge=0, le=MAX_QUOTA), BeforeValidator(not_a_boolean)]
Hours = Annotated[float, Field(ge=0, le=10**9), BeforeValidator(not_a_boolean)]
Share = Annotated[float, Field(gt=0, le=1000), BeforeValidator(not_a_boolean)]
UsageGroup = Literal["project", "user", "job", "sweep"]
CredentialName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
MAX_CREDENTIALS = 10  # they are passed in one environment variable, whose size Linux limits to 128 KiB


class StorageCredential(ApiModel):
    """A credential with which a project's jobs open locations. Refers to its secret and never contains it."""

    prefixes: Annotated[
        list[Annotated[str, StringConstraints(max_length=500)]], Field(min_length=1, max_length=MAX_CREDENTIALS)
    ]
    """URIs of the folders and buckets that it grants access to, such as `s3://bucket/sets`."""
    secret: Annotated[str, StringConstraints(max_length=500)]
    """Location of the secret on every Ray node: `file:/path`, or `profile:NAME` for an AWS profile."""

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        check_reference(self.prefixes, self.secret)
        return self


class ProjectPolicy(ApiModel):
    """A project's share, quotas and budgets. null: the service's default, or no limit if there is no default."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"share": 2, "max_priority": 10, "max_gpus": 16, "max_replicas": 4, "gpu_hours_per_month": 5000}
            ]
        }
    )

    share: Share = 1.0
    """Weight in fair scheduling. Projects with waiting jobs of equal priority share resources in proportion to it."""
    max_priority: Priority | None = None
    """Maximum priority of new jobs."""
    max_running_jobs: Quota | None = None
    """Maximum number of concurrent jobs. Default: AMD_PROJECT_MAX_RUNNING."""
    max_workers: Quota | None = None
    """Maximum number of workers across concurrent jobs. Default: AMD_PROJECT_MAX_WORKERS."""
    max_gpus: Amount | None = None
    """Maximum number of GPUs for concurrent jobs and for deployments, counted at their maximum number of replicas."""
    max_storage_gib: Hours | None = None
    """Maximum total size in GiB of run, job and encoder files. Once it is reached, jobs wait."""
    max_deployments: Quota | None = None
    """Maximum number of deployments."""
    max_replicas: Quota | None = None
    """Maximum number of replicas: the sum of `replicas.max` over all deployments."""
    gpu_hours_per_month: Hours | None = None
    """Budget of GPU-hours per calendar month (UTC). Once it is used up, jobs that need GPUs wait for the next month."""
    cpu_hours_per_month: Hours | None = None
    """Budget of CPU-hours per calendar month (UTC). Once it is used up, jobs wait for the next month."""
    credentials: Annotated[dict[CredentialName, StorageCredential], Field(max_length=MAX_CREDENTIALS)] | None = None
    """Storage credentials of the project's jobs by name. null: the stored ones are kept; {}: they are removed."""

    @model_validator(mode="after")
    def _check_prefixes(self) -> Self:
        used = Counter(normalized_url(prefix) for each in (self.credentials or {}).values() for prefix in each.prefixes)
        if repeated := [prefix for prefix, count in used.items() if count > 1]:
            raise ValueError(
                f"credentials: {repeated[0]} must be a prefix of one credential; remove it from the others"
            )
        return self


class ProjectUse(ApiModel):
    """Resources that currently count towards a project's quotas."""

    running_jobs: int = 0
    """Number of concurrent jobs."""
    workers: int = 0
    """Number of workers across concurrent jobs."""
    gpus: float = 0.0
    """Number of GPUs for concurrent jobs and for deployments, counted at their maximum number of replicas."""
    deployments: int = 0
    replicas: int = 0
    """Sum of `replicas.max` over all deployments."""


class ProjectView(ProjectPolicy):
    """A project with its policy, its current resource use, and its usage in the current calendar month (UTC)."""

    name: str
    in_use: ProjectUse
    """Resources that currently count towards the quotas."""
    gpu_hours: float
    """GPU-hours that jobs have used this month."""
    cpu_hours: float
    """CPU-hours that jobs have used this month."""
    stored_gib: float = 0.0
    """Total size in GiB of run, job and encoder files, measured every 15 minutes."""
    created_at: datetime
    changed_at: datetime
    changed_by: str


class ProjectList(ApiModel):
    items: list[ProjectView]


class UsageView(ApiModel):
    """GPU- and CPU-hours that jobs reserved."""

    key: str
    """Project, user, or ID of the job or sweep, depending on `by`."""
    project: str
    gpu_hours: float
    cpu_hours: float
    jobs: int
    """Number of jobs that ran in the period."""


class UsageList(ApiModel):
    """Usage in a period, largest first."""

    since: datetime
    until: datetime
    items: list[UsageView]
    gpu_hours: float
    """Total GPU-hours, including items beyond the limit."""
    cpu_hours: float
    """Total CPU-hours, including items beyond the limit."""


class ActivityView(ApiModel):
    """A job event, or a change to a deployment, an alias or an encoder."""

    at: datetime
    type: str
    """Object kind and what happened, such as `job.failed` or `alias.move`."""
    target: str
    """ID or name of the object."""
    project: str | None
    """Project of the object."""
    version: int | None
    """Event number in the job's history; null for other objects."""
    actor: str
    """ID of the API key, `oidc:` followed by the token's subject, or `service`."""
    data: dict[str, Any]
    """Details: the changed fields of a job, or the `outcome` of another change."""


class ActivityPage(ApiModel):
    """A page of events, newest first."""

    items: list[ActivityView]
    next_cursor: str | None
    """Cursor for the next page; null on the last page."""


class AuditView(ApiModel):
    """A change made by a user."""

    id: str
    at: datetime
    actor: str
    """ID of the API key, or `oidc:` followed by the token's subject."""
    project: str | None
    """Project of the target; null if it belongs to no project."""
    action: str
    """Target kind and verb, such as `job.cancel`."""
    target: str
    """ID or name of the changed object."""
    outcome: str
    """Result of the change, such as the job's new state."""


class AuditPage(ApiModel):
    """A page of changes, newest first."""

    items: list[AuditView]
    next_cursor: str | None
    """Cursor for the next page; null on the last page."""
