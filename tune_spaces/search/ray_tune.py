"""Ray Tune around a sweep: it places trials, begins lost ones again, and asks the scheduler at each rung.

The one place of the search that imports Ray Tune, beside `stopping` and `trial`. What continues a sweep is the ledger;
Tune's own state goes to a scratch folder and is never read.
"""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.search import Searcher

from amd.training.ray.ray_train import free_workers
from tune_spaces.search.asha import scheduler
from tune_spaces.search.sweep import Sweep
from tune_spaces.search.trial import run_trial

SLOT_MIB = 1  # a trial's driver asks for memory alone: CPUs and GPUs are for its workers
MANY = 1_000_000  # trials: the sweep itself says when it is over


def run_tuner(sweep: Sweep, board: Any, at_once: int, scratch: str) -> None:
    """Until the sweep has nothing to begin and no trial runs."""
    slot = tune.PlacementGroupFactory([{"memory": SLOT_MIB * 2**20}])
    trainable = tune.with_resources(tune.with_parameters(run_trial, board=board), slot)
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_Proposals(sweep),
            scheduler=scheduler(sweep.config, sweep.ledger),
            num_samples=MANY,
            max_concurrent_trials=at_once,
            reuse_actors=True,  # a trial takes over the process and the warm workers of the one before it
        ),
        run_config=tune.RunConfig(
            name=sweep.name,
            storage_path=scratch,
            stop=_Stopper(sweep),
            failure_config=tune.FailureConfig(max_failures=sweep.config.retries),
            callbacks=[_Ear(sweep)],
            verbose=0,
        ),
    ).fit()


class _Proposals(Searcher):
    """Tune asks for trials here; figures go to the ledger by `_Ear`, so there is nothing to remember."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(metric=sweep.config.metric, mode="max")
        self._sweep = sweep

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        record = self._sweep.begin()
        if record is not None:
            return self._sweep.task(record)
        return None if self._sweep.waits() else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        open(checkpoint_path, "wb").close()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is continued from its ledger")


class _Ear(tune.Callback):
    """From Tune's trials to the ledger."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._sweep.hear(trial.config["number"], result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._sweep.ended(trial.config["number"])

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        _free_workers_of(self._sweep, trial.config["number"])
        self._sweep.retried(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        _free_workers_of(self._sweep, trial.config["number"])
        self._sweep.lost(trial.config["number"], "its process was lost again and again")


def _free_workers_of(sweep: Sweep, number: int) -> None:
    """A trial's driver died: what its workers hold stays taken until somebody gives it back."""
    group = sweep.workers.pop(number, None)
    if group is not None:
        free_workers(group)


class _Stopper(tune.Stopper):
    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """At a rung: nothing is left to spend."""
        return self._sweep.spent()

    def stop_all(self) -> bool:
        return self._sweep.abandoned.is_set()
