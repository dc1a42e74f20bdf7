"""Resolve a run's teacher: existing weights, or a preset that is trained once before the student."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from amd.artifacts.discovery import CARD, encoder_folder, encoders_url, load_card
from amd.config import ConfigError, TrainConfig, with_overrides
from amd.exchange.source import license_of
from amd.presets.teachers import teacher_recipe
from amd.storage import exists, join, listdir
from amd.training.failures import TeacherError
from amd.training.run_folder import RunResult
from amd.training.runs.checks import check_data

TrainTeacher = Callable[[TrainConfig, str], RunResult]  # trains a teacher from a config, under a run ID


class ResolvedTeacher(NamedTuple):
    config: TrainConfig
    """Config of the run, in which `teacher.weights` is set and `teacher.preset` is not."""
    license: str | None
    """Licence of the teacher's weights, which the student's weights inherit."""
    parent: str | None = None
    """ID of the run that trained the teacher; None if the weights come from elsewhere."""


class TeacherStopped(Exception):
    """Raised when the teacher's training was stopped, so that the student's run stops too."""


def resolve_teacher(config: TrainConfig, root: str, train: TrainTeacher) -> ResolvedTeacher:
    """Return a run's teacher; train its preset if needed.

    Raises ConfigError if the config or the data is invalid, TeacherError if the training fails, or TeacherStopped if it
    is stopped.
    """
    teacher = config.teacher
    if teacher is None:
        return ResolvedTeacher(config, None)
    if teacher.preset is None:
        return ResolvedTeacher(
            config, teacher.weights_license or license_of(teacher.weights or "", root, field="teacher.weights")
        )
    recipe = teacher_recipe(config)
    run_id = teacher_id(teacher.preset, recipe)
    result = train(with_overrides(recipe, {"name": run_id}), run_id)
    if result.state == "cancelled":
        raise TeacherStopped
    if result.encoder_folder is None:
        raise TeacherError(f"teacher.preset={teacher.preset}: training the teacher failed: {result.message}")
    resolved = with_overrides(config, {"teacher.weights": result.encoder_folder, **_NO_PRESET})
    return ResolvedTeacher(resolved, teacher.weights_license or license_of(result.encoder_folder, root), run_id)


_NO_PRESET: dict[str, Any] = {"teacher.preset": None, "teacher.overrides": {}}


def with_trained_teacher(config: TrainConfig, root: str) -> TrainConfig:
    """Return a run's config with the weights of its trained teacher, without training or reading data.

    If a teacher preset's data has changed over time, uses the newest teacher. Raises ConfigError if there is none yet.
    """
    teacher = config.teacher
    if teacher is None or teacher.preset is None:
        return config
    recipe = teacher_recipe(config)
    folders = [encoder_folder(root, name) for name in listdir(encoders_url(root)) if name.startswith(teacher.preset)]
    cards = [load_card(folder) for folder in folders if exists(join(folder, CARD))]
    trained = [card for card in cards if card.run == _teacher_id(teacher.preset, recipe, card.data.get("digest", ""))]
    if not trained:
        problem = f"teacher.preset={teacher.preset}: the teacher is not trained yet or was deleted"
        raise ConfigError([f"{problem}; retry once it is trained"])
    newest = max(trained, key=lambda card: card.created)
    return with_overrides(config, {"teacher.weights": encoder_folder(root, newest.id), **_NO_PRESET})


def teacher_id(preset: str, recipe: TrainConfig) -> str:
    """Return a run ID derived from the recipe and its data, so that the same teacher is trained only once."""
    return _teacher_id(preset, recipe, check_data(recipe).digest)


def _teacher_id(preset: str, recipe: TrainConfig, data_digest: str) -> str:
    return f"{preset}-{hashlib.sha256(f'{recipe.digest()}/{data_digest}'.encode()).hexdigest()[:12]}"
