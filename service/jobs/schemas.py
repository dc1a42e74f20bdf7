"""Request and response models for jobs. Fields have the same names as in configs and metrics."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from amd.training.run_folder import TeacherTraining
from service.jobs.kinds import JobKind
from service.web.schemas import ApiModel, LabelKey, LabelValue, Priority, Project

State = Literal[
    "queued",
    "starting",
    "running",
    "retrying",
    "pausing",
    "paused",
    "cancelling",
    "succeeded",
    "failed",
    "cancelled",
    "deleting",
    "deleted",
]
ACTIVE: frozenset[State] = frozenset({"starting", "running", "pausing", "cancelling"})
WAITING: frozenset[State] = frozenset({"queued", "retrying"})
DELETED: frozenset[State] = frozenset({"deleting", "deleted"})
ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled", *DELETED})

PUBLISHING: frozenset[JobKind] = frozenset({"train", "finetune", "detect"})
"""Kinds of jobs that publish an encoder with the ID of the job when they succeed."""

Action = Literal["cancel", "pause", "resume", "retry", "delete"]
Reason = Literal[
    "config_invalid",
    "dataset_invalid",
    "teacher_load_failed",
    "storage_unreachable",
    "infeasible_resources",
    "cluster_unavailable",
    "node_lost",
    "preempted_budget",
    "oom_gpu",
    "oom_host",
    "nan_loss",
    "stalled",
    "loader_crashed",
    "time_limit",
    "deadline_exceeded",
    "cancelled_by_user",
    "user_code_error",
    "unknown",
]


class JobRequest(ApiModel):
    """Request to run a job."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"kind": "train", "preset": "demo-image-amd", "overrides": {"schedule.steps": 100}},
                {
                    "kind": "train",
                    "preset": "ssv2-vit-b",
                    "overrides": {
                        "data.train": "s3://bucket/ssv2/{000..099}.tar",
                        "teacher.weights": "s3://bucket/videomae_vit_l.pth",
                        "scaling.workers": [8, 32],
                    },
                    "name": "ssv2 baseline",
                    "labels": {"team": "video"},
                    "priority": 10,
                },
                {
                    "kind": "search",
                    "preset": "demo-image-amd",
                    "config": {"space": {"use": ["masking"]}, "budget": {"trials": 12}},
                },
            ]
        }
    )

    kind: JobKind
    preset: Annotated[str, StringConstraints(max_length=100)] | None = None
    """Name of a preset; `GET /v1/presets` lists them."""
    config: dict[str, Any] | None = None
    """Complete config, instead of a preset. For kind=search, it contains the sweep's fields, and `preset` is the run
    that the sweep varies."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Config values to change, by dotted key: `{"mask.teacher_ratio": 0.6}`."""
    project: Project | None = None
    """Project that owns the job; the job may use this project's encoders and runs. Default: the API key's project, or
    `default` if the key covers all projects."""
    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Display name. The service generates the job's ID."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=32)
    """Key-value pairs for filtering jobs."""
    priority: Priority = 0
    """Priority in the queue; jobs with a higher priority start first."""
    max_retries: int = Field(3, ge=0, le=100)
    """Maximum number of automatic retries after machine, network or storage failures. The count is reset
    when the job makes progress, e.g. saves a newer checkpoint. Other failures are not retried."""
    time_limit_s: float | None = Field(None, gt=0, le=366 * 86400)
    """Maximum running time of an attempt, in seconds. When it is exceeded, the job saves a checkpoint and fails."""

    @property
    def source_preset(self) -> str | None:
        """Preset from which the config is made."""
        return self.preset


class CopyRequest(JobRequest):
    """Request to run a copy of a job. Contains the job's complete config; the job's preset is only recorded."""

    original_preset: str | None

    @property
    def source_preset(self) -> str | None:
        return self.original_preset


class ProgressView(ApiModel):
    """A job's progress."""

    step: int | None = None
    steps: int | None = None
    trials: int | None = None
    """Number of finished trials; null unless the job is a sweep."""
    of_trials: int | None = None
    samples_per_s: float | None = None
    seconds_left: float | None = None
    teacher: bool = False
    """Whether the steps are those of the teacher, which a job with `teacher.preset` trains before the student."""
    at: datetime


class FailureView(ApiModel):
    """Details of an attempt's failure."""

    reason: Reason
    message: str
    """Cause of the failure and how to fix it."""
    rank: int | None = None
    """Rank of the worker that failed first, if any."""
    log_tail: str = ""
    """Last lines of the attempt's log."""


class AttemptView(ApiModel):
    """One execution of a job on the cluster."""

    number: int
    submission_id: str
    """Ray submission ID of the attempt."""
    state: str
    started_at: datetime
    ended_at: datetime | None
    failure: FailureView | None
    cpus: float = 0.0
    """CPUs reserved for the attempt."""
    gpus: float = 0.0
    """GPUs reserved for the attempt."""


class JobView(ApiModel):
    """Current state of a job."""

    id: str
    project: str
    kind: str
    name: str | None
    labels: dict[str, str]
    priority: int
    origin: Literal["api", "external"]
    """Origin of the job; `external` if it was started outside the service and discovered under the storage root."""
    created_by: str
    preset: str | None
    state: State
    reason: Reason | None
    message: str
    """Explanation of why the job is waiting, or why it ended."""
    allowed_actions: list[Action]
    attempt: int
    """Number of attempts started."""
    max_retries: int
    time_limit_s: float | None
    workers: int
    created_at: datetime
    changed_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: ProgressView | None
    teacher: TeacherTraining | None = None
    """Training of the teacher of a job with kind=train and `teacher.preset`, once it has ended; null for other jobs."""
    failure: FailureView | None
    """Failure of the newest attempt."""
    result: dict[str, Any] | None
    """Result reported by the run: metrics, folders and encoder."""
    encoder: str | None
    """ID of the encoder that the job published; null if there is none."""
    run_folder: str


class JobDetail(JobView):
    """A job with its config and attempts."""

    config: dict[str, Any]
    """Resolved config."""
    attempts: list[AttemptView]
    cpu_hours: float = 0.0
    """CPU-hours that the job has used so far, in all attempts."""
    gpu_hours: float = 0.0
    """GPU-hours that the job has used so far, in all attempts."""


class JobFacets(ApiModel):
    """Counts of jobs that match a filter, by state and by kind. Each count ignores the filter on its own field."""

    state: dict[str, int]
    kind: dict[str, int]


class JobPage(ApiModel):
    """A page of jobs, newest first."""

    items: list[JobView]
    next_cursor: str | None
    """Cursor for the next page; null on the last page."""
    facets: JobFacets | None = None
    """Counts of matching jobs by state and kind; null unless requested."""


class EventView(ApiModel):
    """An entry in a job's history."""

    id: int
    """Event number within the job, sent as `id:` in the event stream."""
    at: datetime
    type: str
    actor: str
    """Author of the change: the ID of an API key, an OIDC subject, or `service`."""
    data: dict[str, Any]


class CancelRequest(ApiModel):
    """Options for cancelling a job."""

    deadline_s: float | None = Field(None, gt=0, le=86400)
    """Maximum time in seconds for the final checkpoint, after which the job is killed. Default: derived from
    checkpoint.deadline_s in the config. The workers always abandon the checkpoint after checkpoint.deadline_s, even if
    this value is larger."""


class SeriesView(ApiModel):
    """A metric's values by step."""

    name: str
    steps: list[int]
    values: list[float | None]
    """Value at each step; null if it is not finite."""
    points: int
    """Number of recorded points. If it exceeds `max_points`, only the extremes of each bucket of steps are returned."""


class MetricsView(ApiModel):
    """Metrics recorded by a job's run."""

    series: list[SeriesView]
    names: list[str]
    """Names of all metrics that the run has logged."""
    last_step: int | None


class TrialView(ApiModel):
    """One trial in a sweep."""

    number: int
    state: str
    point: dict[str, Any]
    overrides: dict[str, Any]
    """Config keys that the trial sets, with their values."""
    score: float | None
    rungs: list[dict[str, Any]]
    message: str
    stop_requested: bool
    """Whether a user has asked the trial to stop and it is still saving a checkpoint."""


class CheckpointView(ApiModel):
    """A checkpoint of a job's run."""

    step: int
    url: str


class Estimate(ApiModel):
    """Estimated cost of a job, computed from its config rather than measured."""

    student_parameters: int
    teacher_parameters: int | None
    teacher_steps: int | None
    """Length of the teacher's own training, which precedes the job's unless the teacher exists already; null if the job
    trains no teacher or if the length is not given in steps."""
    flops_per_step: float
    memory_per_worker_bytes: float
    """Approximate memory for weights, gradients, optimizer state and the activations of one micro-batch, per worker."""
    memory_fits: bool | None
    """Whether the job fits in a worker's memory; null if the cluster's memory is unknown."""
    hours: float | None
    """Estimated hours with one H100 per worker at 40% of peak bf16 throughput; null if the data set size is unknown.
    It does not apply if `device` is `cpu`."""
    gpu_hours: float | None
    device: str | None
    """Device that the job would use on the cluster at its current size; null for scaling.device=auto if the cluster is
    not responding."""
    feasible: bool | None
    """Whether the cluster, at its current size, can run the job; null if the cluster is not responding."""


class ValidateView(ApiModel):
    """Result of validating a request without running it."""

    valid: Literal[True] = True
    kind: JobKind
    config: dict[str, Any]
    """Resolved config."""
    warnings: list[str]
    estimate: Estimate | None
    """Estimate for kind=train; null for other kinds."""
