"""Tests for the config of a run that trains a teacher from a preset."""

from __future__ import annotations

import pytest

from amd.config import ConfigError, TrainConfig, with_overrides
from amd.presets.load import find_preset
from amd.presets.teachers import teacher_recipe, with_teacher_data

DEMO = find_preset(TrainConfig, "demo-image-amd").config


def test_a_teacher_uses_its_students_storage_tracking_and_cache() -> None:
    student = {"storage": "/root", "tracking.mlflow": "http://m", "data.cache_dir": "/cache", "data.cache_limit_mib": 5}
    recipe = teacher_recipe(with_overrides(DEMO, student))
    assert (recipe.storage, recipe.tracking.mlflow) == ("/root", "http://m")
    assert (recipe.data.cache_dir, recipe.data.cache_limit_mib) == ("/cache", 5)
    assert recipe.digest() == teacher_recipe(DEMO).digest()


def test_a_teacher_reads_its_data_like_its_student_unless_overridden() -> None:
    limits = {"data.max_bad_fraction": 0.2, "data.damage": "strict", "data.loader_workers": 0}
    student = with_overrides(DEMO, {**limits, "teacher.overrides": {"data.loader_workers": 3}})
    recipe = teacher_recipe(student)
    assert (recipe.data.max_bad_fraction, recipe.data.damage, recipe.data.loader_workers) == (0.2, "strict", 3)
    assert recipe.digest() == teacher_recipe(DEMO).digest()


def test_a_teacher_is_trained_on_its_students_data_unless_overridden() -> None:
    student = with_overrides(DEMO, {"data.train": "/a/list.txt", "data.root": "/a", "data.format": "frame_list"})
    data = teacher_recipe(student).data
    assert (data.train, data.root, data.format) == ("/a/list.txt", "/a", "frame_list")
    for other in ({"data.root": "/b"}, {"data": {"root": "/b"}}):
        data = teacher_recipe(with_overrides(student, {"teacher.overrides": other})).data
        assert (data.train, data.root) == ("/a/list.txt", "/b")
    for other in ({"data.train": "/b/list.txt"}, {"data": {"train": "/b/list.txt"}}):
        data = teacher_recipe(with_overrides(student, {"teacher.overrides": other})).data
        assert (data.train, data.root, data.format) == ("/b/list.txt", "", "auto")


def test_the_data_of_a_teacher_is_written_to_the_config_only_if_it_differs_from_its_presets() -> None:
    assert with_teacher_data(DEMO) == DEMO
    explicit = with_overrides(DEMO, {"data.train": "/a", "teacher.overrides": {"data.train": "/a"}})
    assert with_teacher_data(with_overrides(DEMO, {"data.train": "/a"})) == with_teacher_data(explicit) == explicit
    without_teacher = find_preset(TrainConfig, "demo-image-mae").config
    assert with_teacher_data(without_teacher) == without_teacher


def test_a_teacher_keeps_its_own_augmentation() -> None:
    recipe = teacher_recipe(with_overrides(DEMO, {"data.flip": True, "data.repeats": 4}))
    assert recipe.digest() == teacher_recipe(DEMO).digest()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"teacher.preset": "k400-vit-l-teacher"}, "teacher.preset=k400-vit-l-teacher trains a different encoder"),
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
