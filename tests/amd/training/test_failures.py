from __future__ import annotations

import pytest

from amd.config import ConfigError, Retries
from amd.data.faults import DataFault, LoaderCrash
from amd.training.failures import Budgets, NonFinite, UploadError, classify_failure


class RayActorError(Exception):
    """Stand-in for Ray's error of the same name; errors are classified by class name, without importing Ray."""

    preempted = False


class WorkerHealthCheckFailedError(Exception):
    def __init__(self, failure: Exception) -> None:
        super().__init__(str(failure))
        self.health_check_failure = failure


class Preempted(RayActorError):
    preempted = True


class WorkerGroupStartupTimeoutError(Exception):
    pass


LOST_PEER = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4242")


@pytest.mark.parametrize(
    ("errors", "budget", "reason"),
    [
        ([NonFinite("step 3"), LOST_PEER], "user", "nan_loss"),
        ([LOST_PEER, DataFault("4 of 24")], "user", "dataset_invalid"),
        ([ConfigError(["x"])], "user", "config_invalid"),
        ([LOST_PEER, WorkerHealthCheckFailedError(RayActorError("died"))], "infrastructure", "node_lost"),
        ([WorkerHealthCheckFailedError(Preempted("taken")), LOST_PEER], "preemption", "preempted_budget"),
        (
            [
                LOST_PEER,
                WorkerHealthCheckFailedError(RayActorError("the actor's node was terminated expectedly: SIGTERM")),
            ],
            "preemption",
            "preempted_budget",
        ),
        ([LOST_PEER], "infrastructure", "node_lost"),
        ([LoaderCrash("killed")], "infrastructure", "loader_crashed"),
        ([UploadError("bucket away")], "infrastructure", "storage_unreachable"),
        ([ZeroDivisionError("division by zero"), LOST_PEER], "user", "user_code_error"),
        ([WorkerGroupStartupTimeoutError("2 workers")], "infrastructure", "infeasible_resources"),
        ([], "infrastructure", "node_lost"),
    ],
)
def test_the_cause_of_a_failure_takes_precedence_over_its_consequences(
    errors: list[BaseException], budget: str, reason: str
) -> None:
    verdict = classify_failure(errors)
    assert (verdict.budget, verdict.reason) == (budget, reason)


def test_gpu_out_of_memory_is_a_user_error_with_a_remedy() -> None:
    import torch

    verdict = classify_failure([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])
    assert (verdict.budget, verdict.reason) == ("user", "oom_gpu")
    assert "scaling.micro_batch" in verdict.message


def test_each_kind_of_failure_has_a_separate_budget() -> None:
    budgets = Budgets(Retries(infrastructure=2, preemption=1, user=0))
    assert [budgets.charge("infrastructure", 0) for _ in range(3)] == [True, True, False]
    assert [budgets.charge("preemption", 0) for _ in range(2)] == [True, False]
    assert budgets.charge("user", 0) is False


def test_a_newer_checkpoint_refills_all_budgets_and_an_older_one_does_not() -> None:
    budgets = Budgets(Retries(infrastructure=2, preemption=1))
    assert all(budgets.charge("infrastructure", step) for step in range(0, 400, 4)), "each failure follows progress"
    assert budgets.charge("preemption", 396)
    assert [budgets.charge("infrastructure", 396), budgets.charge("infrastructure", 392)] == [True, False]
    assert budgets.charge("preemption", 400), "the other budget is refilled too"
    assert budgets.charge("infrastructure", 400)


def test_a_failure_message_states_the_retry_budget_and_the_step_of_the_last_refill() -> None:
    budgets = Budgets(Retries(infrastructure=3))
    budgets.charge("infrastructure", 0)
    assert budgets.describe("infrastructure") == "infrastructure failure 1 of 3 since the start"
    budgets.charge("infrastructure", 40)
    budgets.charge("infrastructure", 40)
    assert budgets.describe("infrastructure") == "infrastructure failure 2 of 3 since step 40"
