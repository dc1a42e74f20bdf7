"""What goes over the wire about jobs: requests and views. Words as in the config and the metrics."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from service.jobs.kinds import JobKind

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
]
ACTIVE: frozenset[State] = frozenset({"starting", "running", "pausing", "cancelling"})
WAITING: frozenset[State] = frozenset({"queued", "retrying"})
ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})

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
    "loader_crashed",
    "time_limit",
    "deadline_exceeded",
    "cancelled_by_user",
    "user_code_error",
    "unknown",
]
LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(max_length=255)]
Project = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
DEFAULT_PROJECT = "default"  # of what a caller of all projects makes without saying whose it is


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class JobRequest(Wire):
    """A job to run."""

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
    """A named recipe; `GET /v1/presets` lists them."""
    config: dict[str, Any] | None = None
    """A whole config in place of a preset; for kind=search the sweep's fields, `preset` being the run to vary."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys: `{"mask.teacher_ratio": 0.6}`."""
    project: Project | None = None
    """None: the key's own; for a key of all projects: `default`."""
    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    """For people. The job's id is made by the service."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=32)
    priority: int = Field(0, ge=-100, le=100)
    """Higher starts earlier."""
    max_retries: int = Field(3, ge=0, le=100)
    """After failures of machines, network or storage; errors of config, data or code are not tried again."""
    time_limit_s: float | None = Field(None, gt=0, le=366 * 86400)
    """Of an attempt's running time; past it the job is stopped with a checkpoint and has failed."""


class ProgressView(Wire):
    """How far the job is."""

    step: int | None = None
    steps: int | None = None
    trials: int | None = None
    """Trials ended; of a sweep."""
    of_trials: int | None = None
    samples_per_s: float | None = None
    seconds_left: float | None = None
    at: datetime


class FailureView(Wire):
    """Why an attempt did not succeed."""

    reason: Reason
    message: str
    """One sentence, and what to do."""
    rank: int | None = None
    """The worker that failed first, where one did."""
    log_tail: str = ""
    """The last lines of the attempt's log."""


class AttemptView(Wire):
    number: int
    submission_id: str
    """Ray's."""
    state: str
    started_at: datetime
    ended_at: datetime | None
    failure: FailureView | None


class JobView(Wire):
    """A job as it stands."""

    id: str
    project: str
    kind: str
    name: str | None
    labels: dict[str, str]
    priority: int
    origin: Literal["api", "external"]
    """external: begun outside the service, and found on the storage root."""
    created_by: str
    preset: str | None
    state: State
    reason: Reason | None
    message: str
    """What it waits for, or why it ended as it did."""
    allowed_actions: list[Action]
    attempt: int
    """Attempts begun."""
    max_retries: int
    time_limit_s: float | None
    workers: int
    created_at: datetime
    changed_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: ProgressView | None
    failure: FailureView | None
    """Of the newest attempt."""
    result: dict[str, Any] | None
    """What the run itself says at its end: figures, folders, encoder."""
    encoder: str | None
    """Id of the encoder it published."""
    run_folder: str


class JobDetail(JobView):
    config: dict[str, Any]
    """Resolved."""
    attempts: list[AttemptView]


class JobPage(Wire):
    items: list[JobView]
    next_cursor: str | None
    """For the next page; null on the last."""


class EventView(Wire):
    """One entry of a job's history."""

    id: int
    """Counts the job's changes; the `id:` of the event stream."""
    at: datetime
    type: str
    actor: str
    """A key's id, an OIDC subject, or `service`."""
    data: dict[str, Any]


class CancelRequest(Wire):
    deadline_s: float | None = Field(None, gt=0, le=86400)
    """How long the job may take for its last checkpoint before it is ended by force; null: what its config says
    (checkpoint.deadline_s), beyond which its workers give up in any case."""


class SeriesView(Wire):
    """A metric over steps."""

    name: str
    steps: list[int]
    values: list[float | None]
    """null: not a finite number."""
    points: int
    """Points there are; fewer are sent where max_points asks so, with every bucket's lowest and highest kept."""


class MetricsView(Wire):
    series: list[SeriesView]
    names: list[str]
    """Every name the run has logged."""
    last_step: int | None


class TrialView(Wire):
    number: int
    state: str
    point: dict[str, Any]
    score: float | None
    rungs: list[dict[str, Any]]
    message: str


class CheckpointView(Wire):
    step: int
    url: str


class Estimate(Wire):
    """What a job will take: counted from its config, not measured."""

    student_parameters: int
    teacher_parameters: int | None
    flops_per_step: float
    memory_per_worker_bytes: float
    """Weights, gradients, optimizer and activations of a micro-batch; roughly."""
    memory_fits: bool | None
    """None: the cluster's memory is not known."""
    hours: float | None
    """On H100s at 40 % of their bf16 rate, one a worker; null: the data set's size is not known."""
    gpu_hours: float | None
    feasible: bool | None
    """Whether the cluster as it is can ever run it; null: it does not answer."""


class ValidateView(Wire):
    """What a request comes to, without running it."""

    valid: Literal[True] = True
    kind: JobKind
    config: dict[str, Any]
    """Resolved."""
    warnings: list[str]
    estimate: Estimate | None
    """For kinds that train."""
