"""Early stopping: Ray Tune's asynchronous successive halving, made to say the same again after a restart.

A trial is known to it by its number and not by Tune's own id, its bracket follows from that number, and a fresh one
learns from the ledger what the one before it was told.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger

TIME = "halving_time"  # of a report: 1 at the first rung, reduction at the second, reduction² …


def scheduler(search: SearchConfig, ledger: Ledger) -> TrialScheduler:
    if search.stopping == "none":
        return FIFOScheduler()
    made = Halving(search)
    for record, rung in ledger.told():
        made.on_trial_add(None, _stand_in(record.number))
        told = {"level": record.rungs.index(rung), search.metric: rung.score}
        made.on_trial_result(None, _stand_in(record.number), told)
    return made


class Halving(AsyncHyperBandScheduler):
    """asha has one bracket; hyperband one for every rung that a trial may start to be judged from."""

    def __init__(self, search: SearchConfig) -> None:
        brackets = search.rungs if search.stopping == "hyperband" else 1
        super().__init__(
            time_attr=TIME,
            metric=search.metric,
            mode="max",
            grace_period=1,
            max_t=search.reduction ** (search.rungs - 1) * (1 + 1e-6),  # Ray takes logarithms to count rungs
            reduction_factor=search.reduction,
            brackets=brackets,
        )
        self._search = search

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True  # they are set

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        number = _number(trial)
        before = np.random.get_state()
        np.random.seed((self._search.seed * 1_000_003 + number) % 2**32)
        try:
            super().on_trial_add(tune_controller, _stand_in(number))
        finally:
            np.random.set_state(before)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "level" not in result:  # a trial that failed
            return str(TrialScheduler.CONTINUE)
        told = {TIME: self._search.reduction ** result["level"], **result}
        return str(super().on_trial_result(tune_controller, _stand_in(_number(trial)), told))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """It has heard the last rung already."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        pass


def _number(trial: Any) -> int:
    return int(trial.config["number"])


def _stand_in(number: int) -> Any:
    return SimpleNamespace(trial_id=str(number), config={"number": number})
