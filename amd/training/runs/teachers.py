"""Where a run's teacher comes from: weights that exist, or a preset that is trained first, once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from amd.config import ConfigError, TrainConfig, with_overrides
from amd.exchange.source import license_of
from amd.presets.pretraining import from_preset
from amd.training.failures import TeacherError
from amd.training.run_folder import RunResult
from amd.training.runs.checks import check_data

TrainTeacher = Callable[[TrainConfig, str], RunResult]  # train this config under this run id


class ResolvedTeacher(NamedTuple):
    config: TrainConfig
    """The run's config with the teacher given by weights."""
    license: str | None
    """What the teacher's weights hand down."""
    parent: str | None = None
    """The run that made the teacher, if one of ours did."""


class TeacherStopped(Exception):
    """The teacher's own training was stopped; so is the run that waits for it."""


def resolve_teacher(config: TrainConfig, root: str, train: TrainTeacher) -> ResolvedTeacher:
    """Train a teacher preset if that is not done yet. Raises ConfigError, TeacherError, TeacherStopped."""
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
    """The config that trains a teacher preset: on the same machines and storage as the student, unless overridden.

    Raises ConfigError when what it makes would not fit the student's config.
    """
    teacher = config.teacher
    assert teacher is not None, "only a config with a teacher comes here"
    assert teacher.preset is not None, "and one that is made from a preset"
    same = {name: getattr(config, name).model_dump(mode="json") for name in ("scaling", "checkpoint", "tracking")}
    recipe = from_preset(teacher.preset, {**same, "storage": config.storage, **teacher.overrides})
    problems = []
    if recipe.objective.kind != "mae":
        problems.append(f"teacher.preset={teacher.preset}: a teacher is trained by objective.kind=mae")
    if recipe.student.encoder != teacher.encoder:
        problems.append(
            f"teacher.preset={teacher.preset} makes another encoder than teacher.encoder describes: "
            f"{_difference(recipe.student.encoder.model_dump(), teacher.encoder.model_dump())}"
        )
    mine, its = config.clip, recipe.clip
    if (mine.grid, mine.token_values) != (its.grid, its.token_values):
        problems.append(
            f"teacher.preset={teacher.preset} sees clips of {its.frames}x{its.size[0]}x{its.size[1]} in tokens of "
            f"{its.tubelet}x{its.patch}x{its.patch}, the student {mine.frames}x{mine.size[0]}x{mine.size[1]} in "
            f"{mine.tubelet}x{mine.patch}x{mine.patch}: both need the same"
        )
    if problems:
        raise ConfigError(problems)
    return recipe


def teacher_id(preset: str, recipe: TrainConfig) -> str:
    """A name that follows from the recipe and its data, so that the same teacher is trained once."""
    digest = hashlib.sha256(f"{recipe.digest()}/{check_data(recipe).digest}".encode()).hexdigest()
    return f"{preset}-{digest[:12]}"


def _difference(its: dict[str, Any], mine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {its[key]} there, {mine[key]} here" for key in its if its[key] != mine[key])
