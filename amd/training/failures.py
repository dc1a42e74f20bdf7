"""What went wrong, whose budget pays for it, and whether the run goes on: decisions, apart from their execution.

Knows nothing of Ray's classes by import: an error from a worker is judged by its own kind or by its name, so this file
works where Ray is not installed. Exceptions here take plain arguments, so they cross process borders.
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
    "node_lost",
    "preempted_budget",
    "deadline_exceeded",
    "cancelled_by_user",
]


class RunError(Exception):
    """A run that stopped for a known reason, with a message that a user can act on."""

    reason: Reason = "user_code_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class NonFinite(RunError):
    """The loss or the gradient is no longer a number; the message names the step and its samples."""

    reason: Reason = "nan_loss"


class TeacherError(RunError):
    """The teacher could not be made or loaded."""

    reason: Reason = "teacher_load_failed"


class InfeasibleResources(RunError):
    """The cluster did not give what the workers need within scaling.start_timeout_s."""

    reason: Reason = "infeasible_resources"


class NoCluster(RunError):
    """Ray could not be started here."""

    reason: Reason = "cluster_unavailable"


class UploadError(RunError):
    """A checkpoint or metrics could not be written to the storage root; worth another attempt."""

    reason: Reason = "storage_unreachable"


@dataclass(frozen=True)
class Verdict:
    budget: Budget
    reason: Reason
    message: str


# A collective that breaks because its peer is gone: the peer's death is the cause, this is only the echo.
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


# A node that was told to end did so before its deadline: Ray calls only what outlives the deadline preempted.
_TAKEN = "node was terminated expectedly"


def judge(errors: Iterable[BaseException]) -> Verdict:
    """Whose fault a failed attempt was, from the errors of its workers. The most telling error decides.

    An error is told from its echo on the other ranks: a rank that raises, or a lost node, breaks the collectives of all
    the others.
    """
    verdicts = sorted((_judge_one(error) for error in errors), key=lambda found: found[0])
    if not verdicts:
        return Verdict("infrastructure", "node_lost", "the workers ended without saying why")
    return verdicts[0][1]


def _judge_one(error: BaseException) -> tuple[int, Verdict]:
    """A rank of how telling the error is (lower tells more), and what it says."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error).strip() or type(error).__name__
    inner = getattr(error, "health_check_failure", None) or getattr(error, "cause", None)
    if isinstance(inner, BaseException) and inner is not error:
        return _judge_one(inner)
    if isinstance(error, UploadError):
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
    if "PreemptionError" in names or getattr(error, "preempted", False) or _TAKEN in text:
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
        # There was room when the attempt began: a node that died is counted for a while after. The next one looks anew.
        return 2, Verdict("infrastructure", "infeasible_resources", text)
    if names & {"WorkerHealthCheckTimeoutError", "NCCLHangError", "WorkerGroupStartupFailedError"}:
        return 3, Verdict("infrastructure", "node_lost", text.split("\n")[0])
    if "DistError" in names or any(sign in text.lower() for sign in _LOST_PEER):
        return 5, Verdict("infrastructure", "node_lost", "a worker lost touch with the others")
    return 4, Verdict("user", "user_code_error", f"{type(error).__name__}: {text}")


@dataclass
class Budgets:
    """What is left of `scaling.retries`; each failure is charged to its own budget."""

    limits: Retries
    spent: dict[Budget, int] = field(default_factory=dict)

    def charge(self, budget: Budget) -> bool:
        """Count a failure; whether the run may be tried again."""
        self.spent[budget] = self.spent.get(budget, 0) + 1
        allowed: int = getattr(self.limits, budget)
        return self.spent[budget] <= allowed
