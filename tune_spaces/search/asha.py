"""Early stopping with Ray Tune's asynchronous successive halving, made deterministic across restarts.

A trial is identified by its number instead of Tune's ID, and the number determines its bracket. A new scheduler replays
the rungs in the ledger.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger

TIME = "halving_time"  # result key: 1 at the first rung, reduction at the second, reduction² at the third


def make_scheduler(search: SearchConfig, ledger: Ledger) -> TrialScheduler:
    """Return a sweep's scheduler, with its state restored from the ledger."""
    if search.stopping == "none":
        return FIFOScheduler()
    halving = SuccessiveHalving(search)
    for record, rung in ledger.rungs_by_time():
        halving.on_trial_add(None, _tune_trial(record.number))
        result = {"level": record.rungs.index(rung), search.metric: rung.score}
        halving.on_trial_result(None, _tune_trial(record.number), result)
    return halving


class SuccessiveHalving(AsyncHyperBandScheduler):
    """Successive halving: asha uses one bracket; hyperband uses one for each rung at which judging can start."""

    def __init__(self, search: SearchConfig) -> None:
        brackets = search.rungs if search.stopping == "hyperband" else 1
        super().__init__(
            time_attr=TIME,
            metric=search.metric,
            mode="max",
            grace_period=1,
            max_t=search.reduction ** (search.rungs - 1) * (1 + 1e-6),  # margin: Ray counts rungs with a logarithm
            reduction_factor=search.reduction,
            brackets=brackets,
        )
        self._search = search

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True  # already set

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        number = _number(trial)
        before = np.random.get_state()
        np.random.seed((self._search.seed * 1_000_003 + number) % 2**32)
        try:
            super().on_trial_add(tune_controller, _tune_trial(number))
        finally:
            np.random.set_state(before)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "level" not in result:  # the trial failed
            return str(TrialScheduler.CONTINUE)
        result = {TIME: self._search.reduction ** result["level"], **result}
        return str(super().on_trial_result(tune_controller, _tune_trial(_number(trial)), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Do nothing: the last rung has already been reported."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        pass


def _number(trial: Any) -> int:
    return int(trial.config["number"])


def _tune_trial(number: int) -> Any:
    return SimpleNamespace(trial_id=str(number), config={"number": number})
