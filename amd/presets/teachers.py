"""Config of the run that trains a teacher from `teacher.preset` and `teacher.overrides`. Torch-free."""

from __future__ import annotations

from typing import Any

from amd.config import ClipConfig, ConfigError, TrainConfig, flatten, with_overrides
from amd.config.run import READER_FIELDS
from amd.presets.load import find_preset, load_config

STORED_DATA = ("train", "format", "root", "frame_name")  # fields of `data` that locate the files


def with_teacher_data(config: TrainConfig) -> TrainConfig:
    """Return the config with the location of its data in `teacher.overrides`, unless they contain `data.train`.

    Values that the teacher's preset already has are omitted, so most configs do not change. A run whose teacher is
    trained on other data after an upgrade is therefore refused, as after any change of its config.
    Raises ConfigError if the preset is unknown.
    """
    teacher = config.teacher
    if teacher is None or teacher.preset is None:
        return config
    try:
        preset = find_preset(TrainConfig, teacher.preset).config
    except ConfigError as error:
        raise ConfigError([_located(line) for line in error.problems]) from None
    overrides = flatten(teacher.overrides)
    names = [name for name in STORED_DATA if getattr(config.data, name) != getattr(preset.data, name)]
    if "data.train" in overrides or not names:
        return config
    data = {f"data.{name}": getattr(config.data, name) for name in names}
    return with_overrides(config, {"teacher.overrides": {**data, **overrides}})


def teacher_recipe(config: TrainConfig) -> TrainConfig:
    """Return the config that trains a teacher preset.

    It uses the student's storage, tracking and cache, and the student's data, limits on reading it, scaling and
    checkpoint settings unless overridden.
    Raises ConfigError for an invalid recipe, or if the resulting teacher would not fit the student's config.
    """
    teacher = with_teacher_data(config).teacher
    assert teacher is not None, "the config has a teacher"
    assert teacher.preset is not None, "the teacher is specified by a preset"
    shared = {name: getattr(config, name).model_dump(mode="json") for name in ("scaling", "checkpoint", "tracking")}
    reader = {f"data.{name}": getattr(config.data, name) for name in READER_FIELDS}
    overrides = {**shared, **reader, "storage": config.storage, **teacher.overrides}
    try:
        recipe = load_config(TrainConfig, teacher.preset, None, overrides)
    except ConfigError as error:
        raise ConfigError([_located(line) for line in error.problems]) from None
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


def _located(problem: str) -> str:
    """Prefix a recipe's problem with the field of the student's config that causes it."""
    return f"teacher.{problem}" if problem.startswith("preset=") else f"teacher.overrides.{problem}"


def _difference(preset: dict[str, Any], config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {preset[key]}, not {config[key]}" for key in preset if preset[key] != config[key])


def _clip_shape(clip: ClipConfig) -> str:
    pixels = f"{clip.frames}x{clip.size[0]}x{clip.size[1]}"
    return f"{pixels} in tokens of {clip.tubelet}x{clip.patch}x{clip.patch}"
