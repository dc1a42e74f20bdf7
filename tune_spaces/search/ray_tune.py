"""Run a sweep on Ray Tune, which places trials, restarts lost ones, and consults the scheduler at each rung.

Apart from `asha` and `trial`, the only search module that imports Ray Tune. A sweep resumes from its
ledger; Tune's own state goes to a scratch folder and is never read.
"""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.search import Searcher

from amd.training.ray.ray_train import free_workers
from tune_spaces.search.asha import make_scheduler
from tune_spaces.search.sweep import Sweep
from tune_spaces.search.trial import run_trial

TRIAL_DRIVER_MIB = 1  # a trial's driver requests only memory, leaving CPUs and GPUs to its workers
NUM_SAMPLES = 1_000_000  # effectively unlimited: the sweep decides when to stop


def run_tuner(sweep: Sweep, coordinator: Any, at_once: int, scratch: str) -> None:
    """Run trials until all have finished and no more can start."""
    slot = tune.PlacementGroupFactory([{"memory": TRIAL_DRIVER_MIB * 2**20}])
    trainable = tune.with_resources(tune.with_parameters(run_trial, coordinator=coordinator), slot)
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_LedgerSearcher(sweep),
            scheduler=make_scheduler(sweep.config, sweep.ledger),
            num_samples=NUM_SAMPLES,
            max_concurrent_trials=at_once,
            reuse_actors=True,  # reuse the process and the warm workers of the previous trial
        ),
        run_config=tune.RunConfig(
            name=sweep.name,
            storage_path=scratch,
            stop=_BudgetStopper(sweep),
            failure_config=tune.FailureConfig(max_failures=sweep.config.retries),
            callbacks=[_LedgerCallback(sweep)],
            verbose=0,
        ),
    ).fit()


class _LedgerSearcher(Searcher):
    """Suggests the sweep's next trial. Stateless: `_LedgerCallback` records results in the ledger."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(metric=sweep.config.metric, mode="max")
        self._sweep = sweep

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        record = self._sweep.next_trial()
        if record is not None:
            return self._sweep.task(record)
        return None if self._sweep.is_waiting() else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        open(checkpoint_path, "wb").close()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep resumes from its ledger")


class _LedgerCallback(tune.Callback):
    """Records the results of Tune's trials in the ledger."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._sweep.record_result(trial.config["number"], result)
        _allow_failures(trial, self._sweep.config.retries)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._sweep.record_end(trial.config["number"])

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        _free_trial_workers(self._sweep, trial.config["number"])
        if self._sweep.record_retry(trial.config["number"]):
            _allow_failures(trial, self._sweep.config.retries - 1)  # this failure is the first since the checkpoint

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        _free_trial_workers(self._sweep, trial.config["number"])
        self._sweep.record_loss(trial.config["number"], "its process was lost more often than `retries` allows")


def _allow_failures(trial: Any, count: int) -> None:
    """Allow a trial to fail `count` more times. Tune's limit applies to all failures since the trial was created."""
    trial.max_failures = trial.num_failures + count


def _free_trial_workers(sweep: Sweep, number: int) -> None:
    """Release the resources of a trial whose driver died, because its workers would otherwise keep them."""
    group = sweep.workers.pop(number, None)
    if group is not None:
        free_workers(group)


class _BudgetStopper(tune.Stopper):
    """Stops trials at their next rung once the budget is spent."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._sweep.budget_spent()

    def stop_all(self) -> bool:
        return self._sweep.grace_expired.is_set()
