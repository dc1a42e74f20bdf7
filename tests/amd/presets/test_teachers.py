"""Tests for the config of a run that trains a teacher from a preset."""

from __future__ import annotations

import pytest

from amd.config import ConfigError, TrainConfig, with_overrides
from amd.presets.load import find_preset
from amd.presets.teachers import teacher_recipe

DEMO = find_preset(TrainConfig, "demo-image-amd").config


def test_a_teacher_uses_its_students_storage_tracking_and_cache() -> None:
    student = {"storage": "/root", "tracking.mlflow": "http://m", "data.cache_dir": "/cache", "data.cache_limit_mib": 5}
    recipe = teacher_recipe(with_overrides(DEMO, student))
    assert (recipe.storage, recipe.tracking.mlflow) == ("/root", "http://m")
    assert (recipe.data.cache_dir, recipe.data.cache_limit_mib) == ("/cache", 5)
    assert recipe.digest() == teacher_recipe(DEMO).digest()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"teacher.preset": "k400-vit-l-teacher"}, "teacher.overrides.data.train: presets contain no data"),
        ({"teacher.preset": "no-such-teacher"}, "teacher.preset='no-such-teacher': unknown; "),
        ({"teacher.overrides": {"optim.base_rl": 1}}, "teacher.overrides.optim.base_rl: unknown key"),
    ],
)
def test_an_invalid_teacher_recipe_is_reported_with_the_field_in_the_student_config(
    overrides: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError) as invalid:
        teacher_recipe(with_overrides(DEMO, overrides))
    assert invalid.value.problems[0].startswith(problem)
