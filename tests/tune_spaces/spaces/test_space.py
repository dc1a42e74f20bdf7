"""Tests for spaces built on every base config. Also covers draft.py and parameter.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from amd.config import ConfigError, TrainConfig, validate, with_overrides
from amd.presets.pretraining import PRESETS
from tests.support.runs.configs import mae
from tests.support.runs.space_bases import BASES, NO_GENERATION, space_of
from tune_spaces.config import Dimension, SpaceConfig, SpaceName
from tune_spaces.spaces.space import (
    PARAMETERS,
    SPACES,
    Space,
    baseline,
    build_space,
    config_of,
    grid,
    grid_size,
    overrides_of,
    read_space,
    sample_point,
)

UNIONS: tuple[tuple[SpaceName, ...], ...] = (
    *((name,) for name in SPACES),
    tuple(SPACES),
)
TRIED = [(name, use) for name in BASES for use in UNIONS if not (use == ("generator",) and name in NO_GENERATION)]


def test_the_config_accepts_exactly_the_implemented_spaces() -> None:
    assert set(SPACES) == set(get_args(SpaceName))


@pytest.mark.parametrize("name", BASES)
def test_every_dimension_is_a_parameter_or_a_config_key(name: str) -> None:
    for use in SPACES:
        for dimension in SPACES[use](BASES[name]):
            assert dimension in PARAMETERS or dimension.split(".")[0] in TrainConfig.model_fields


@pytest.mark.parametrize(("name", "use"), TRIED)
def test_every_point_is_a_valid_config_and_survives_a_round_trip_through_plain_data(
    name: str, use: tuple[SpaceName, ...]
) -> None:
    space, numbers = space_of(name, use=use), random.Random(7)
    for _ in range(30):
        point = sample_point(space, numbers)
        config = config_of(space, point)
        assert config.mask.teacher_ratio <= config.mask.student_ratio
        overrides = overrides_of(space, point)
        assert with_overrides(space.base, json.loads(json.dumps(overrides))).digest() == config.digest()
        assert overrides_of(space, json.loads(json.dumps(point))) == overrides
        assert list(overrides) == sorted(overrides)


@pytest.mark.parametrize(("name", "use"), TRIED)
def test_the_baseline_is_the_base_config(name: str, use: tuple[SpaceName, ...]) -> None:
    space = space_of(name, use=use)
    point = baseline(space)
    assert point is not None
    assert list(point) == list(space.dimensions)
    assert overrides_of(space, point) == {}
    assert config_of(space, point).digest() == BASES[name].digest()
    for dimension, value in point.items():
        choices = space.dimensions[dimension].choices
        assert choices is None or value in choices


def test_overrides_contain_only_values_that_differ_from_the_base() -> None:
    space = space_of("k400-vit-b", use=["masking", "alignment"])
    point = {**(baseline(space) or {}), "masking.teacher_ratio": 0.5}
    assert overrides_of(space, point) == {"mask.teacher_ratio": 0.5}


def test_points_that_describe_the_same_run_share_a_digest() -> None:
    space = space_of("demo-image-amd", use=["masking"])
    digests = {config_of(space, point).digest() for point in grid(space)}
    assert len(digests) < (grid_size(space) or 0)  # clamped points coincide
    assert len(digests) == len({json.dumps(overrides_of(space, point)) for point in grid(space)})


def test_a_custom_dimension_replaces_the_same_dimension_of_a_named_space() -> None:
    space = space_of("k400-vit-b", use=["masking"], dimensions={"masking.teacher_ratio": [0.75, 0.8]})
    assert space.dimensions["masking.teacher_ratio"].choices == (0.75, 0.8)
    assert len(space.dimensions["masking.student_ratio"].choices or ()) > 2


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [
        ({"optim.base_lr": [1e-3, 1.2e-3]}, {"optim.base_lr": 1.2e-3}),
        ({"optim.base_lr": {"low": 1e-4, "high": 1e-2, "log": True}}, {"optim.base_lr": 1.2e-3}),
        ({"optim.base_lr": {"low": 1e-4, "high": 1e-3}}, None),
        ({"mask.teacher_ratio": {"low": 0.5, "high": 0.9, "step": 0.05}}, {"mask.teacher_ratio": 0.75}),
        ({"mask.teacher_ratio": {"low": 0.5, "high": 0.9, "step": 0.1}}, None),
        ({"student.generator.depth": {"low": 1, "high": 4, "step": 1}}, {"student.generator.depth": 2}),
        ({"objective.distance": ["l1", "smooth_l1"]}, None),
        ({"alignment.layers": ["last", [[0.5, 0.5], [1, 1]]]}, {"alignment.layers": [[0.5, 0.5], [1, 1]]}),
        ({"clip.size": [112, 224]}, {"clip.size": 224}),
    ],
)
def test_custom_dimensions_can_exclude_the_base(dimension: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert baseline(space_of("k400-vit-b", dimensions=dimension)) == expected


def test_a_grid_lists_every_point_in_order() -> None:
    own = {"optim.weight_decay": [0.0, 0.05], "mask.teacher_ratio": {"low": 0.1, "high": 0.35, "step": 0.1}}
    space = space_of("k400-vit-b", dimensions=own)
    points = list(grid(space))
    assert grid_size(space) == len(points) == 6
    assert [point["mask.teacher_ratio"] for point in points] == [0.1, 0.2, 0.3] * 2  # not 0.30000000000000004
    assert [point["optim.weight_decay"] for point in points] == [0.0] * 3 + [0.05] * 3


def test_a_range_without_a_step_has_no_grid() -> None:
    space = space_of("k400-vit-b", use=["recipe"])
    assert grid_size(space) is None
    with pytest.raises(ConfigError, match=r"space\.dimensions\.recipe\.lr_scale: .* set step or choices"):
        grid(space)


REFUSED = {
    "masking.teacher_rato=[0.5, 0.6]": "space.dimensions.masking.teacher_rato: unknown; did you mean masking.",
    "mask.teacher_rato=[0.5, 0.6]": "did you mean mask.teacher_ratio?",
    "optm.base_lr=[0.1, 0.2]": "did you mean optim.base_lr?",
    "quux=[1, 2]": "must be one of masking.student_ratio",
    "variant=[last, middle]": "space.dimensions.variant: unknown",
    "optim.clip_norm=[none, 1]": "space.dimensions.optim.clip_norm='none': must be a valid number",
    "objective.distance=[l2, l3]": "distance='l3': must be 'l2', 'l1' or 'smooth_l1'",
    "student.generator.depth={low: 1, high: 4}": "set step=1, or choices",
    "mask.teacher_ratio={low: 0.5, high: 1.5}": "must be less than 1",
    "objective.layers.0.teacher=[6, half]": "space.dimensions.objective.layers.0.teacher='half'",
    "scaling.threads_per_worker=[1, 2]": "does not affect training",
    "data.loader_workers=[1, 2]": "does not affect training",
    "optim.weight_decay=[0.05]": "its points all produce the same run",
    "student.generator.heads=[3, 5]": "none of 2 points is a valid config; first error: student.generator.heads=3",
    "schedule.warmup_epochs=[300, 400]": "none of 2 points is a valid config",
}


@pytest.mark.parametrize("fields", REFUSED)
def test_the_error_for_an_invalid_space_contains_field_rule_and_remedy(fields: str) -> None:
    name, _, value = fields.partition("=")
    with pytest.raises(ConfigError) as error:
        space_of("k400-vit-b", dimensions={name: yaml.safe_load(value)})
    assert REFUSED[fields] in str(error.value)
    assert str(error.value).startswith("space")


@pytest.mark.parametrize(
    ("used", "own"),
    [
        ("masking", "mask.teacher_ratio"),
        ("alignment", "objective.layers"),
        ("alignment", "objective.layers.0.teacher"),
        ("alignment", "objective.weights.direct"),
        ("generator", "student.generator.heads"),
        ("recipe", "schedule.warmup_epochs"),
    ],
)
def test_two_dimensions_that_set_the_same_key_are_rejected(used: str, own: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"space\.dimensions\.{own}: sets the same config key as \w+\.\w+; remove one"
    ):
        space_of("k400-vit-b", use=[used], dimensions={own: [1, 2]})


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        space_of("k400-vit-b", dimensions={"quux": [1, 2], "optim.eps": ["small", 1], "optim.betas": [[1], [2]]})
    assert len(error.value.problems) == 3


def test_a_config_without_a_teacher_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"objective\.kind=mae"):
        build_space(SpaceConfig(use=("recipe",)), mae(BASES["tiny video"]))


def test_an_invalid_combination_of_custom_dimensions_is_rejected_per_point() -> None:
    space = space_of("k400-vit-b", dimensions={"student.generator.heads": [5, 8, 16]})
    assert config_of(space, {"student.generator.heads": 8}).generator_heads == 8
    with pytest.raises(ConfigError, match=r"student\.generator\.heads=5 must divide"):
        config_of(space, {"student.generator.heads": 5})


def test_a_dimension_that_removes_the_teacher_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"objective\.kind=amd requires a teacher"):
        space_of("k400-vit-b", use=["alignment", "generator"], dimensions={"teacher": [None]})


def test_parameters_missing_from_a_point_keep_their_base_values() -> None:
    assert overrides_of(Space({}, BASES["k400-vit-b"]), {}) == {}


def test_a_space_is_built_from_names() -> None:
    assert read_space("masking, recipe") == SpaceConfig(use=("masking", "recipe"))
    assert read_space("serial") == SpaceConfig(study="serial")


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_space_is_loaded_from_a_file(tmp_path: Path, suffix: str) -> None:
    values = {"use": ["masking"], "dimensions": {"optim.base_lr": {"low": 1e-4, "high": 1e-2, "log": True}}}
    path = tmp_path / f"space.{suffix}"
    path.write_text(yaml.safe_dump(values) if suffix == "yaml" else json.dumps(values))
    config = read_space(str(path))
    assert config.use == ("masking",)
    assert config.dimensions["optim.base_lr"] == Dimension(low=1e-4, high=1e-2, log=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("maskin", "space='maskin': unknown; did you mean masking?"),
        ("masking,recpe", "did you mean recipe?"),
        ("masking,serial", "space=serial: a study defines its own space; use it without other spaces"),
        ("quux", "the spaces are masking, alignment, generator, recipe; the studies are asymmetry"),
        ("masking,masking", "space.use=['masking', 'masking'] repeats a space"),
        ("/nowhere/space.yaml", "space /nowhere/space.yaml: cannot be read"),
        ("", "space='': unknown"),
    ],
)
def test_an_unknown_name_or_file_is_rejected(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_space(text)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[masking]", "must be an object with the fields of a space (use, study, dimensions), not list"),
        ("use: [masking", "neither JSON nor YAML"),
        ("usee: [masking]", "space.usee: unknown key; did you mean use?"),
        ("use: [maskin]", "space.use.0='maskin'"),
        ("{}", "space: nothing varies"),
        ("study: serial\nuse: [masking]", "space.study defines its own space"),
        ("dimensions: {optim.eps: {low: 1}}", "space.dimensions.optim.eps: set choices"),
        ("dimensions: {optim.eps: [1, 1]}", "space.dimensions.optim.eps: choices=[1, 1] repeat"),
        ("dimensions: {optim.eps: 3}", "space.dimensions.optim.eps"),
    ],
)
def test_a_file_without_a_valid_space_is_rejected(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_space(str(path))
    assert expected in str(error.value)


def test_spaces_import_neither_torch_nor_ray_nor_optuna() -> None:
    code = (
        "import sys, tune_spaces.spaces.space, tune_spaces.ledger;"
        "assert not {'torch', 'ray', 'optuna'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_ratio_that_is_valid_only_in_some_combinations_is_offered() -> None:
    base = with_overrides(PRESETS["demo-image-amd"].config, {"mask.student_ratio": 0.5, "mask.teacher_ratio": 0.5})
    dimensions = {"mask.student_ratio": [0.25, 0.5], "mask.teacher_ratio": [0.0, 0.25]}
    config = validate(SpaceConfig, {"dimensions": dimensions})
    space = build_space(config, base)
    assert len({config_of(space, point).digest() for point in grid(space)}) > 1
