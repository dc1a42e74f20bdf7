"""Find and check the checkpoint of another run from which a forked run starts; the training loop loads it.

Weights, optimizer state and step come from the checkpoint; everything else, including the schedule, comes from the
run's config.
"""

from __future__ import annotations

import re

import torch

from amd.config import ConfigError, TrainConfig, validate
from amd.models.student import Student
from amd.storage import join, listdir, read_json
from amd.training.checkpoints.listing import CHECKPOINTS, MANIFEST, checkpoint_url, newest_step
from amd.training.run_folder import CONFIG, run_folder

_CHECKPOINT = re.compile(rf"([^/]+)/{CHECKPOINTS}/step-(\d{{8,}})")


def find_parent(config: TrainConfig, root: str, run_id: str, steps: int) -> tuple[str, int] | None:
    """Return the run and the step of the checkpoint that `config.start` names, or None if it is not set.

    Raises ConfigError if a new run cannot start from it. `steps`: number of steps of the whole run.
    """
    if config.start is None:
        return None
    match = _CHECKPOINT.fullmatch(config.start.rstrip("/").removeprefix(f"{join(root, 'runs')}/"))
    if match is None:
        raise ConfigError(
            [f"start={config.start}: must be a checkpoint of a run below {root}, as `amd jobs fork` sets it"]
        )
    parent, step = match[1], int(match[2])
    if newest_step(run_folder(root, run_id)) == 0:  # otherwise the run continues from its own checkpoint
        _check(config, root, parent, step, steps)
    return parent, step


def _check(config: TrainConfig, root: str, parent: str, step: int, steps: int) -> None:
    folder = run_folder(root, parent)
    if MANIFEST not in listdir(checkpoint_url(join(folder, CHECKPOINTS), step)):
        raise ConfigError(
            [f"start={config.start}: there is no such checkpoint; only checkpoint.pin_steps are always kept"]
        )
    if step >= steps:
        raise ConfigError([f"start={config.start}: the run has only {steps} steps; raise schedule.epochs or steps"])
    known, needed = _shapes(validate(TrainConfig, read_json(join(folder, CONFIG)))), _shapes(config)
    differing = sorted(name for name in known.keys() | needed.keys() if known.get(name) != needed.get(name))
    if differing:
        raise ConfigError(
            [
                f"start={config.start}: its weights do not fit this config ({', '.join(differing[:3])}); keep student, "
                "clip, teacher.encoder, and the alignment and reconstruction settings as in that run"
            ]
        )


def _shapes(config: TrainConfig) -> dict[str, torch.Size]:
    """Return the shapes of a student's weights, without allocating them."""
    with torch.device("meta"):
        return {name: value.shape for name, value in Student(config).state_dict().items()}
