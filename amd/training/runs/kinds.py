"""What tells one kind of run from another, for `launch`: its checks, its work, and what it publishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from amd.config import RunConfig, TrainConfig
from amd.presets.pretraining import check_complete
from amd.training.process_group import Team
from amd.training.run_folder import RunResult, RunSpec
from amd.training.runs.checks import DataFacts, check_data, check_teacher
from amd.training.runs.publishing import publish
from amd.training.runs.teachers import resolve_teacher
from amd.training.trainer.loop import Edge, Outcome
from amd.training.trainer.pretraining import work

Work = Callable[[RunSpec, Team, Edge], Outcome]
Trained = Callable[[TrainConfig, str], RunResult]  # pre-train this config under this run id


class Resolved(Protocol):
    @property
    def config(self) -> RunConfig: ...


class Kind(NamedTuple):
    """Functions of a module each, so that `work` travels to workers by its name."""

    name: str
    """As run.json and run ids have it."""
    check: Callable[[Any], DataFacts]
    """Config against data. Raises ConfigError."""
    check_weights: Callable[[Any], None]
    """Load once what the config names, here, where a mistake is told in a second. Raises ConfigError."""
    resolve: Callable[[Any, str, Trained], Any]
    """(config, root, train) -> Resolved: make what must be made first. Raises ConfigError, RunError, Stopped."""
    work: Work
    publish: Callable[[Any, Any, str, str, DataFacts], str]
    """(config, resolved, root, run id, data) -> folder of the published encoder."""
    probed_on_the_way: bool = False
    """Whether a section `probe` of its config asks for probes beside the training."""


def _check(config: TrainConfig) -> DataFacts:
    check_complete(config)
    return check_data(config)


def _check_weights(config: TrainConfig) -> None:
    if config.teacher is not None and config.teacher.preset is None:
        check_teacher(config)


PRETRAINING = Kind("train", _check, _check_weights, resolve_teacher, work, publish, probed_on_the_way=True)
