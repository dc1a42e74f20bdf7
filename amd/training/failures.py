"""Classify failures: the reason, the retry budget to charge, and whether the run may be retried.

Works without Ray, whose errors are recognised by class name. Exceptions take plain arguments, so that they can be
pickled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from amd.config import ConfigError, Retries
from amd.data.faults import DataFault, LoaderCrash
from amd.storage import StorageUnreachable

Budget = Literal["infrastructure", "preemption", "user"]
Reason = Literal[
    "config_invalid",
    "storage_unreachable",
    "dataset_invalid",
    "loader_crashed",
    "teacher_load_failed",
    "infeasible_resources",
    "cluster_unavailable",
    "user_code_error",
    "nan_loss",
    "oom_gpu",
    "oom_host",
    "stalled",
    "node_lost",
    "preempted_budget",
    "deadline_exceeded",
    "cancelled_by_user",
]


class RunError(Exception):
    """Base class of failures with a known reason and a message that the user can act on."""

    reason: Reason = "user_code_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class NonFinite(RunError):
    """Raised when the loss or its gradient is not finite. The message lists the step and its samples."""

    reason: Reason = "nan_loss"


class TeacherError(RunError):
    """Raised when the teacher could not be trained or loaded."""

    reason: Reason = "teacher_load_failed"


class InfeasibleResources(RunError):
    """Raised when the cluster did not provide the workers' resources within scaling.start_timeout_s."""

    reason: Reason = "infeasible_resources"


class NoCluster(RunError):
    """Raised when Ray could not be started on this machine."""

    reason: Reason = "cluster_unavailable"


class UploadError(RunError):
    """Raised when a checkpoint or metrics could not be written to the storage root. Retryable."""

    reason: Reason = "storage_unreachable"


class Stalled(RunError):
    """Raised when a worker has made no progress for scaling.stall_timeout_s. Retryable."""

    reason: Reason = "stalled"

    def __init__(self, message: str = "the run made no progress for scaling.stall_timeout_s") -> None:
        super().__init__(message)


@dataclass(frozen=True)
class Verdict:
    budget: Budget
    reason: Reason
    message: str


# Messages of collectives that fail because a peer has died: a consequence, not the cause.
_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo",
    "nccl",
    "process group",
    "timed out waiting",
    "socket",
)


# Message for a node that exited before its preemption deadline: Ray reports preemption only after the deadline.
_NODE_DRAINED = "node was terminated expectedly"


def classify_failure(errors: Iterable[BaseException]) -> Verdict:
    """Classify a failed attempt by its workers' errors. The most specific error decides.

    A rank that raises, or a lost node, breaks the collectives of all other ranks; those errors are ignored if there is
    a more specific one.
    """
    verdicts = sorted((_classify_one(error) for error in errors), key=lambda found: found[0])
    if not verdicts:
        return Verdict("infrastructure", "node_lost", "the workers exited without reporting an error")
    return verdicts[0][1]


def _classify_one(error: BaseException) -> tuple[int, Verdict]:
    """Return (rank, verdict); a lower rank means a more specific error."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error).strip() or type(error).__name__
    inner = getattr(error, "health_check_failure", None) or getattr(error, "cause", None)
    if isinstance(inner, BaseException) and inner is not error:
        return _classify_one(inner)
    if isinstance(error, UploadError | Stalled):
        return 0, Verdict("infrastructure", error.reason, text)
    if isinstance(error, StorageUnreachable):
        return 0, Verdict("infrastructure", "storage_unreachable", text)
    if isinstance(error, LoaderCrash):
        return 0, Verdict("infrastructure", "loader_crashed", text)
    if isinstance(error, DataFault):
        return 0, Verdict("user", "dataset_invalid", text)
    if isinstance(error, RunError):
        return 0, Verdict("user", error.reason, text)
    if isinstance(error, ConfigError):
        return 0, Verdict("user", "config_invalid", text)
    if "PreemptionError" in names or getattr(error, "preempted", False) or _NODE_DRAINED in text:
        return 1, Verdict("preemption", "preempted_budget", text)
    if "OutOfMemoryError" in names and type(error).__module__.startswith("torch"):
        remedy = "; lower scaling.micro_batch, which keeps the batch by accumulating gradients"
        return 2, Verdict("user", "oom_gpu", text.split("\n")[0] + remedy)
    if "OutOfMemoryError" in names:
        return 2, Verdict("infrastructure", "oom_host", text)
    if names & {
        "RayActorError",
        "ActorDiedError",
        "NodeDiedError",
        "WorkerCrashedError",
        "WorkerHealthCheckFailedError",
    }:
        return 3, Verdict("infrastructure", "node_lost", "a worker process or its node was lost")
    if names & {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}:
        # Resources were free when the attempt started: Ray counts a dead node for a while. The next attempt rechecks.
        return 2, Verdict("infrastructure", "infeasible_resources", text)
    if names & {"WorkerHealthCheckTimeoutError", "NCCLHangError", "WorkerGroupStartupFailedError"}:
        return 3, Verdict("infrastructure", "node_lost", text.split("\n")[0])
    if "DistError" in names or any(sign in text.lower() for sign in _LOST_PEER):
        return 5, Verdict("infrastructure", "node_lost", "a worker lost its connection to the others")
    return 4, Verdict("user", "user_code_error", f"{type(error).__name__}: {text}")


@dataclass
class Budgets:
    """Remaining retries (`scaling.retries`), with a budget per cause of failure.

    Progress, such as a newer checkpoint, refills all budgets, so they limit consecutive failures without progress
    rather than failures per run.
    """

    limits: Retries
    spent: dict[Budget, int] = field(default_factory=dict)
    step: int = 0
    """Step of the newest checkpoint, or another measure of progress, at the last failure."""

    def charge(self, budget: Budget, step: int) -> bool:
        """Count a failure after `step`; return whether the run may be retried."""
        if step > self.step:
            self.spent.clear()
            self.step = step
        self.spent[budget] = self.spent.get(budget, 0) + 1
        return self.spent[budget] <= self.limit(budget)

    def limit(self, budget: Budget) -> int:
        allowed: int = getattr(self.limits, budget)
        return allowed

    def describe(self, budget: Budget, unit: str = "step") -> str:
        """Describe the last failure, for example `infrastructure failure 1 of 3 since step 40`."""
        since = f"{unit} {self.step}" if self.step else "the start"
        return f"{budget} failure {self.spent[budget]} of {self.limit(budget)} since {since}"
