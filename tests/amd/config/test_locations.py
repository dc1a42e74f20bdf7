"""Tests for finding and replacing locations in configs, and for the fields that dimensions and overrides cannot set."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from amd.config import (
    ConfigError,
    ConfigLocation,
    FinetuneConfig,
    LocationError,
    TrainConfig,
    locations,
    validate,
    with_overrides,
)
from amd.config.locations import locations_in, replace_in_overrides, replace_locations
from tests.support.runs.configs import mae, tiny_image_config
from tune_spaces.config import SearchConfig

DATA = {"data.train": "/data"}


def found(config: Any) -> dict[str, str]:
    return {location.field: location.value for location in locations(config)}


def search(dimensions: dict[str, Any]) -> SearchConfig:
    train = tiny_image_config().model_dump(mode="json")
    return validate(SearchConfig, {"train": train, "space": {"dimensions": dimensions}})


def test_locations_are_found_in_every_section_with_their_role() -> None:
    probe = {"data": {"train": "p", "test": "q", "root": ""}}
    config = tiny_image_config(probe=probe, storage="s3://b/root", tracking__mlflow="http://m", data__cache_dir="/c")
    assert set(locations(config)) == {
        ConfigLocation("data.train", "demo:digits", "data"),
        ConfigLocation("data.cache_dir", "/c", "cache"),
        ConfigLocation("teacher.weights", "teacher.safetensors", "weights"),
        ConfigLocation("probe.data.train", "p", "data"),
        ConfigLocation("probe.data.test", "q", "data"),
        ConfigLocation("storage", "s3://b/root", "storage"),
        ConfigLocation("tracking.mlflow", "http://m", "tracking"),
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"data.train": "/a"}, {"data.train": "/a"}),
        ({"data": {"train": "/a", "root": "/b", "crop": "center"}}, {"data.train": "/a", "data.root": "/b"}),
        ({"probe": {"data": {"train": "/a", "test": "/b"}}}, {"probe.data.train": "/a", "probe.data.test": "/b"}),
        ({"probe.data": {"train": "/a"}}, {"probe.data.train": "/a"}),
        ({"teacher": {"overrides": {"data.train": "/a"}}}, {"teacher.overrides.data.train": "/a"}),
        ({"teacher.overrides.data.train": "/a"}, {"teacher.overrides.data.train": "/a"}),
        ({"seed": 1, "data.train": None, "data": {"unknown": "/a"}, "no.such.key": "/a"}, {}),
    ],
)
def test_locations_are_found_in_overrides_and_dimensions(overrides: dict[str, Any], expected: dict[str, str]) -> None:
    preset = {"teacher.weights": None, "teacher.preset": "a-teacher"}
    config = with_overrides(tiny_image_config(), {**preset, "teacher.overrides": overrides})
    assert found(config) == {
        "data.train": "demo:digits",
        **{f"teacher.overrides.{field}": value for field, value in expected.items()},
    }
    sweep = found(search({key: [value] for key, value in overrides.items()}))
    in_space = {field: value for field, value in sweep.items() if field.startswith("space.")}
    assert in_space == {f"space.dimensions.{field}": value for field, value in expected.items()}


def test_locations_are_found_in_every_choice_of_a_dimension() -> None:
    sweep = search({"data.train": {"choices": ["/a", "/b"]}, "optim.base_lr": {"low": 0.1, "high": 0.2}})
    values = [location.value for location in locations(sweep) if location.field == "space.dimensions.data.train"]
    assert values == ["/a", "/b"]


def test_replacing_locations_leaves_all_other_values_unchanged() -> None:
    preset = {"teacher.weights": None, "teacher.preset": "a-teacher", "teacher.overrides": {**DATA, "seed": 3}}
    values = with_overrides(tiny_image_config(), preset).model_dump(mode="json")
    replaced = replace_locations(TrainConfig, values, lambda location: f"new:{location.value}")
    expected = values | {"data": values["data"] | {"train": "new:demo:digits"}}
    expected["teacher"] = values["teacher"] | {"overrides": {"data.train": "new:/data", "seed": 3}}
    assert replaced == expected
    assert replace_locations(TrainConfig, values, lambda location: location.value) == values


def test_dotted_overrides_keep_their_keys_when_locations_are_replaced() -> None:
    overrides = {"data.train": "a", "data.val": "b", "weights": None, "optim.betas": [0.9, 0.99], "data": {"test": "c"}}
    replaced = replace_in_overrides(FinetuneConfig, overrides, lambda location: f"/{location.value}")
    assert replaced == {**overrides, "data.train": "/a", "data.val": "/b", "data": {"test": "/c"}}


def test_locations_are_found_in_invalid_and_outdated_configs() -> None:
    values = {"data": {"train": "/a", "gone": "/b"}, "teacher": None, "probe": "text", "gone": {"train": "/c"}}
    assert [location.value for location in locations_in(TrainConfig, values)] == ["/a"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"storage": "/x"}, "storage"),
        ({"name": "x"}, "name"),
        ({"tracking": {"mlflow": "http://m"}}, "tracking.mlflow"),
        ({"tracking": {"tensorboard": False}}, "tracking"),
        ({"tracking.log_every_steps": 5}, "tracking.log_every_steps"),
        ({"data.cache_dir": "/x"}, "data.cache_dir"),
        ({"data": {"train": "/a", "cache_dir": "/x"}}, "data.cache_dir"),
        ({"probe": {"data": {"cache_dir": "/x"}}}, "probe.data.cache_dir"),
    ],
)
def test_output_and_cache_settings_are_rejected_as_teacher_overrides_and_dimensions(
    change: dict[str, Any], field: str
) -> None:
    preset = {"teacher.weights": None, "teacher.preset": "a-teacher"}
    with pytest.raises(LocationError, match=rf"^teacher\.overrides\.{field}: .*remove the override") as refused:
        with_overrides(tiny_image_config(), {**preset, "teacher.overrides": {"seed": 1, **change}})
    assert refused.value.field == f"teacher.overrides.{field}"
    with pytest.raises(LocationError, match=rf"^space\.dimensions\.{field}: a sweep cannot vary") as refused:
        search({key: [value] for key, value in change.items()})
    assert refused.value.field == f"space.dimensions.{field}"
    restored = pickle.loads(pickle.dumps(refused.value))
    assert (restored.problems, restored.field) == (refused.value.problems, refused.value.field)


def test_a_range_over_a_fixed_field_is_rejected() -> None:
    with pytest.raises(LocationError, match=r"^space\.dimensions\.tracking\.guard_min_rank: "):
        search({"tracking.guard_min_rank": {"low": 0.1, "high": 0.2}})


@pytest.mark.parametrize("nest", [lambda value: {"teacher.overrides": value}, lambda value: [value]])
def test_values_nested_too_deeply_are_rejected(nest: Any) -> None:
    value: Any = 1
    for _ in range(100):
        value = nest(value)
    preset = {"teacher.weights": None, "teacher.preset": "a-teacher"}
    with pytest.raises(ConfigError, match=r"teacher\.overrides\.seed: nested more than 64 levels deep"):
        with_overrides(tiny_image_config(), {**preset, "teacher.overrides": {"seed": value}})
    with pytest.raises(ConfigError, match=r"space\.dimensions\.seed: nested more than 64 levels deep"):
        search({"seed": [value]})


def test_a_config_without_a_teacher_has_no_teacher_locations() -> None:
    assert found(mae(tiny_image_config())) == {"data.train": "demo:digits"}
