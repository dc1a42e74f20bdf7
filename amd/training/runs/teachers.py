"""Resolve a run's teacher: existing weights, or a preset, which is trained before the student and only once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from amd.config import ClipConfig, ConfigError, TrainConfig, with_overrides
from amd.exchange.source import license_of
from amd.presets.load import load_config
from amd.training.failures import TeacherError
from amd.training.run_folder import RunResult
from amd.training.runs.checks import check_data

TrainTeacher = Callable[[TrainConfig, str], RunResult]  # pre-trains a config under a run id


class ResolvedTeacher(NamedTuple):
    config: TrainConfig
    """Config of the run, in which the teacher is specified by weights."""
    license: str | None
    """Licence of the teacher's weights, which the student's weights inherit."""
    parent: str | None = None
    """ID of the run that trained the teacher; None if the weights come from elsewhere."""


class TeacherStopped(Exception):
    """Raised when the teacher's training was stopped, so that the student's run stops too."""


def resolve_teacher(config: TrainConfig, root: str, train: TrainTeacher) -> ResolvedTeacher:
    """Return a run's teacher; train its preset if needed. Raises ConfigError, TeacherError or TeacherStopped."""
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
        raise TeacherError(f"teacher.preset={teacher.preset}: its training failed: {result.message}")
    resolved = with_overrides(config, {"teacher.weights": result.encoder_folder, **_NO_PRESET})
    return ResolvedTeacher(resolved, teacher.weights_license or license_of(result.encoder_folder, root), run_id)


_NO_PRESET: dict[str, Any] = {"teacher.preset": None, "teacher.overrides": {}}


def teacher_recipe(config: TrainConfig) -> TrainConfig:
    """Return the config that trains a teacher preset, with the student's scaling and storage unless overridden.

    Raises ConfigError if the resulting teacher would not fit the student's config.
    """
    teacher = config.teacher
    assert teacher is not None, "the config has a teacher"
    assert teacher.preset is not None, "the teacher is specified by a preset"
    shared = {name: getattr(config, name).model_dump(mode="json") for name in ("scaling", "checkpoint", "tracking")}
    recipe = load_config(TrainConfig, teacher.preset, None, {**shared, "storage": config.storage, **teacher.overrides})
    problems = []
    if recipe.objective.kind != "mae":
        problems.append(
            f"teacher.preset={teacher.preset} has objective.kind={recipe.objective.kind}: a teacher must use mae"
        )
    if recipe.student.encoder != teacher.encoder:
        problems.append(
            f"teacher.preset={teacher.preset} trains a different encoder than teacher.encoder: "
            f"{_difference(recipe.student.encoder.model_dump(), teacher.encoder.model_dump())}"
        )
    ours, theirs = config.clip, recipe.clip
    if (ours.grid, ours.token_values) != (theirs.grid, theirs.token_values):
        problems.append(
            f"teacher.preset={teacher.preset} takes clips of {_clip_shape(theirs)}, the student {_clip_shape(ours)}: "
            "student and teacher need the same token grid"
        )
    if problems:
        raise ConfigError(problems)
    return recipe


def teacher_id(preset: str, recipe: TrainConfig) -> str:
    """Return a run id derived from the recipe and its data, so that the same teacher is trained only once."""
    digest = hashlib.sha256(f"{recipe.digest()}/{check_data(recipe).digest}".encode()).hexdigest()
    return f"{preset}-{digest[:12]}"


def _difference(preset: dict[str, Any], config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {preset[key]}, not {config[key]}" for key in preset if preset[key] != config[key])


def _clip_shape(clip: ClipConfig) -> str:
    pixels = f"{clip.frames}x{clip.size[0]}x{clip.size[1]}"
    return f"{pixels} in tokens of {clip.tubelet}x{clip.patch}x{clip.patch}"
