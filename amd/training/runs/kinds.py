"""Kinds of runs that `launch` can train: their checks, their training loop, and how they publish the encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from amd.config import RunConfig, TrainConfig
from amd.presets.load import check_complete
from amd.presets.teachers import teacher_recipe
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunSpec
from amd.training.runs.checks import DataFacts, check_data, check_teacher
from amd.training.runs.publishing import publish
from amd.training.runs.teachers import TrainTeacher, resolve_teacher
from amd.training.trainer.pretraining import work
from amd.training.trainer.run_hooks import LoopResult, RunHooks

Work = Callable[[RunSpec, ProcessGroup, RunHooks], LoopResult]


class ResolvedRun(Protocol):
    @property
    def config(self) -> RunConfig: ...


class RunKind(NamedTuple):
    """Functions that implement one kind of run.

    `work` is defined at module level, so that workers can import it by name.
    """

    name: str
    """Name of this kind of run, as used in run.json and in run IDs."""
    check: Callable[[Any], DataFacts]
    """Check the config and its data. Raises ConfigError if either is invalid."""
    check_weights: Callable[[Any], object]
    """Load the config's weights once, so that errors appear before the run starts. Raises ConfigError if it fails."""
    resolve: Callable[[Any, str, TrainTeacher], Any]
    """Train the teacher if needed: (config, root, train) -> ResolvedRun. Raises ConfigError, RunError if the training
    fails, or TeacherStopped if it is stopped."""
    work: Work
    publish: Callable[[Any, Any, str, str, DataFacts], str]
    """Publish the encoder: (config, resolved, root, run ID, data) -> encoder folder."""
    supports_probe: bool = False
    """Whether the config section `probe` enables probes during training."""


def _check(config: TrainConfig) -> DataFacts:
    check_complete(config)
    if config.trains_teacher:
        check_data(teacher_recipe(config))  # an invalid teacher leaves no run behind, whose name would be taken
    return check_data(config)


def _check_weights(config: TrainConfig) -> None:
    if config.teacher is not None and config.teacher.preset is None:
        check_teacher(config)


PRETRAINING = RunKind("train", _check, _check_weights, resolve_teacher, work, publish, supports_probe=True)
