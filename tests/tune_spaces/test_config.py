"""Tests for every sweep config rule: the error message states the field, the rule and the remedy."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from amd.config import ConfigError, with_overrides
from amd.config import validate as validated
from tests.support.runs import ledgers
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config
from tune_spaces.config import Dimension, SearchConfig, SpaceConfig

TRAIN = ledgers.search().train.model_dump(mode="json")
MASKING = {"use": ["masking"]}


def problems(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validated(SearchConfig, {"train": TRAIN, "space": MASKING, **values})
    return error.value.problems


TWO = {"algorithm": "tpe", "against": "teacher_gflops"}
PBT = {"algorithm": "pbt", "seeds": 1, "space": {"use": ["recipe"]}}

RULES: list[tuple[dict[str, Any], str]] = [
    (
        {"train": mae(tiny_video_config()).model_dump(mode="json")},
        "train.objective.kind=mae: ~choose a config with a teacher",
    ),
    (
        {"train": tiny_image_config(scaling__workers=[1, 2]).model_dump(mode="json")},
        "train.scaling.workers=[1, 2]: ~fixed number of workers~set one number",
    ),
    (
        {"train": tiny_image_config(start="/runs/a/checkpoints/step-00000004").model_dump(mode="json")},
        "train.start=/runs/a/checkpoints/step-00000004: ~start from scratch",
    ),
    ({"against": "step_gflops"}, "against=step_gflops: ~only algorithm=tpe supports two objectives"),
    (TWO, "against=teacher_gflops: ~cannot be ranked for early stopping; set stopping=none"),
    ({**PBT, "stopping": "asha"}, "stopping=asha: algorithm=pbt ~instead of stopping them; set stopping=none"),
    ({**PBT, "space": MASKING}, "space.use=['masking']: algorithm=pbt ~use space.use=[recipe]"),
    ({**PBT, "space": {"use": ["recipe", "masking"]}}, "space.use=['masking']: algorithm=pbt ~use space.use=[recipe]"),
    (
        {**PBT, "space": {"dimensions": {"student.generator.depth": [1, 2]}}},
        "space.dimensions.student.generator.depth: algorithm=pbt ~or dimensions of optim",
    ),
    (
        {**PBT, "space": {"use": ["recipe"], "dimensions": {"optim.batch_size": [64, 128]}}},
        "space.dimensions.optim.batch_size: algorithm=pbt ~other than optim.batch_size",
    ),
    ({**PBT, "seeds": 3}, "seeds=3: with algorithm=pbt, a child continues a single run; set seeds=1"),
    ({**PBT, "budget": {"trials": 3}}, "budget.trials=3: with algorithm=pbt this is the population, ~set 4 or more"),
    ({**PBT, "space": {"study": "layers"}}, "space.study runs every variant to completion: set algorithm=grid"),
    ({**PBT, "rungs": 1}, "rungs=1: algorithm=pbt replaces trials between rungs; set 2 or more"),
    ({"space": {"study": "layers"}, "algorithm": "random"}, "space.study ~set algorithm=grid, stopping=none"),
    ({"space": {"study": "layers"}, "stopping": "asha"}, "space.study ~set algorithm=grid, stopping=none"),
    ({"space": {}}, "space: nothing varies; set space.use, space.study or space.dimensions"),
    ({"space": {"use": ["masking", "masking"]}}, "space.use=['masking', 'masking'] repeats a space; ~once"),
    ({"space": {"study": "layers", "use": ["masking"]}}, "space.study defines its own space; remove space.use and "),
    (
        {"space": {"study": "layers", "dimensions": {"optim.eps": [1, 2]}}},
        "space.study ~remove space.use and space.dimensions",
    ),
    ({"space": {"use": ["msking"]}}, "space.use.0='msking': ~'masking'"),
    ({"space": {"study": "lairs"}}, "space.study='lairs': ~'layers'"),
    ({"space": {"uses": ["masking"]}}, "space.uses: unknown key; did you mean space.use?"),
    ({"algorithm": "cmaes"}, "algorithm='cmaes': ~'tpe'"),
    ({"stopping": "median"}, "stopping='median': ~'hyperband'"),
    ({"metric": "loss/total"}, "metric='loss/total': ~'eval/knn_top1'"),
    ({**TWO, "against": "seconds", "stopping": "none"}, "against='seconds': ~'teacher_gflops'"),
    ({"rungs": 0}, "rungs=0: ~greater than or equal to 1"),
    ({"rungs": 11}, "rungs=11: ~less than or equal to 10"),
    ({"reduction": 1}, "reduction=1: ~greater than or equal to 2"),
    ({"seeds": 0}, "seeds=0: ~greater than or equal to 1"),
    ({"at_once": 0}, "at_once=0: ~greater than or equal to 1"),
    ({"retries": -1}, "retries=-1: ~greater than or equal to 0"),
    ({"seed": 2**31}, f"seed={2**31}: ~less than"),
    ({"name": "../up"}, "name='../up': ~pattern"),
    ({"name": "a" * 81}, "name='aaa"),
    ({"budget": {"trials": 0}}, "budget.trials=0: ~greater than or equal to 1"),
    ({"budget": {"hours": 0}}, "budget.hours=0: ~greater than 0"),
    ({"budget": {"clips": 0}}, "budget.clips=0: ~greater than or equal to 1"),
    ({"budget": {"trails": 3}}, "budget.trails: unknown key; did you mean budget.trials?"),
    ({"trials": 3}, "trials: unknown key"),
    ({"train": None}, "train=None"),
]


@pytest.mark.parametrize(("values", "expected"), RULES)
def test_the_error_for_a_broken_rule_contains_field_rule_and_remedy(values: dict[str, Any], expected: str) -> None:
    start, *parts = expected.split("~")
    lines = [line for line in problems(values) if line.startswith(start)]
    assert lines, problems(values)
    assert all(any(part in line for line in lines) for part in parts), lines


DIMENSIONS: list[tuple[Any, str]] = [
    ({"low": 2, "high": 1}, "low=2.0 must be below high=1.0"),
    ({"low": 1, "high": 1}, "low=1.0 must be below high=1.0"),
    ({"low": 1}, "set choices: [a, b, …], or low and high"),
    ({}, "set choices: [a, b, …], or low and high"),
    ({"low": 0, "high": 1, "log": True}, "low=0.0 must be above 0 if log=true"),
    ({"low": 1, "high": 2, "log": True, "step": 1}, "step and log cannot be combined; list the values as choices"),
    ({"low": 1, "high": 2, "step": 0}, "step=0: must be greater than 0"),
    ({"low": "few", "high": 2}, "low='few': must be a valid number"),
    ({"low": 1, "high": math.inf}, "high=inf: must be a finite number"),
    ({"choices": [1, 2], "low": 1}, "choices cannot be combined with low and high"),
    ({"choices": [1, 2], "log": True}, "choices cannot be combined with low and high"),
    ([1, 2, 1], "choices=[1, 2, 1] repeats a value; list each value once"),
    ([], "choices=[]: "),
    ({"lo": 1, "high": 2}, "lo: unknown key; did you mean low?"),
    (3, "3 is not a dimension; set choices: [a, b, …], or low and high"),
    (None, "None is not a dimension"),
]


@pytest.mark.parametrize(("value", "expected"), DIMENSIONS)
def test_an_invalid_dimension_is_reported_with_its_name(value: Any, expected: str) -> None:
    (lines,) = problems({"space": {"dimensions": {"optim.base_lr": value, "optim.eps": [1e-8, 1e-6]}}})
    assert lines.startswith(f"space.dimensions.optim.base_lr: {expected}")


def test_all_invalid_dimensions_are_reported_together() -> None:
    lines = problems({"space": {"dimensions": {"optim.base_lr": {"low": 2, "high": 1}, "optim.eps": [1, 1]}}})
    assert [line.split(": ")[0] for line in lines] == ["space.dimensions.optim.base_lr", "space.dimensions.optim.eps"]


def test_all_broken_rules_are_reported_together() -> None:
    lines = problems({"algorithm": "pbt", "stopping": "asha", "rungs": 1, "against": "step_gflops"})
    assert len(lines) == 5


def test_1_true_and_the_string_1_are_distinct_choices() -> None:
    assert validated(Dimension, {"choices": [1, True, "1"]}).choices == (1, True, "1")


def test_exponent_notation_that_yaml_reads_as_text_is_converted_to_a_number() -> None:
    choices = yaml.safe_load("[1e-8, 1.0e-6, -2E5, [1e-3, last], e5, 1e]")
    assert validated(Dimension, {"choices": choices}).choices == (1e-8, 1e-6, -2e5, [1e-3, "last"], "e5", "1e")


def test_a_list_is_shorthand_for_choices() -> None:
    short = validated(SpaceConfig, {"dimensions": {"optim.eps": [1e-8, 1e-6]}})
    long = validated(SpaceConfig, {"dimensions": {"optim.eps": {"choices": [1e-8, 1e-6]}}})
    made = validated(SpaceConfig, {"dimensions": {"optim.eps": Dimension(choices=(1e-8, 1e-6))}})
    assert short == long == made


def test_a_study_is_a_full_grid_by_default() -> None:
    config = ledgers.search(space={"study": "layers"})
    assert (config.algorithm, config.stopping, config.rungs) == ("grid", "none", 1)
    assert ledgers.search(space=SpaceConfig(study="layers")) == config
    assert ledgers.search(space={"study": "layers"}, rungs=3).rungs == 3


@given(
    rungs=st.integers(1, 10),
    reduction=st.integers(2, 10),
    first=st.none() | st.floats(0.01, 0.9),
    warmup=st.integers(0, 500),
)
def test_consecutive_rungs_differ_by_a_constant_factor(
    rungs: int, reduction: int, first: float | None, warmup: int
) -> None:
    config = ledgers.search(rungs=rungs, reduction=reduction, first_rung=first)
    config = with_overrides(config, {"train.schedule.warmup_steps": warmup})
    fractions = config.fractions()
    assert len(fractions) == rungs
    assert fractions[-1] == 1
    factors = [after / before for before, after in pairwise(fractions)]
    assert all(factor == pytest.approx(factors[0]) for factor in factors)
    assert all(factor > 1 for factor in factors)
    if rungs > 1 and first is not None:
        assert fractions[0] == pytest.approx(first)
    elif rungs > 1:
        twice = min(0.5, 2 * warmup / 500)
        assert fractions[0] == pytest.approx(max(reduction ** -(rungs - 1), 0.2, twice))


def test_population_based_training_has_evenly_spaced_rungs() -> None:
    assert ledgers.search(**PBT, rungs=4).fractions() == (0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"storage": "/elsewhere"},
        {"name": "b-sweep"},
        {"at_once": 2},
        {"retries": 0},
        {"budget.trials": 50, "budget.hours": 3.0, "budget.clips": 10},
        {"train.storage": "/elsewhere", "train.name": "x", "train.checkpoint.every_minutes": 1.0},
    ],
)
def test_storage_name_budget_and_concurrency_are_not_part_of_the_identity(changes: dict[str, Any]) -> None:
    config = ledgers.search()
    assert with_overrides(config, changes).identity() == config.identity()


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "tpe"},
        {"stopping": "none"},
        {"rungs": 2},
        {"reduction": 4},
        {"seeds": 1},
        {"seed": 1},
        {"metric": "eval/top1"},
        {"space.use": ["alignment"]},
        {"train.optim.base_lr": 0.5},
        {"train.seed": 3},
        {"train.probe": {"data": {"train": "demo:digits/probe", "test": "demo:digits/select"}}},
    ],
)
def test_all_other_fields_are_part_of_the_identity(changes: dict[str, Any]) -> None:
    config = ledgers.search()
    assert with_overrides(config, changes).identity() != config.identity()


def test_population_settings_are_part_of_the_identity() -> None:
    config = ledgers.search(**PBT)
    assert with_overrides(config, {"budget.trials": 50}).identity() != config.identity()
    assert with_overrides(config, {"budget.hours": 3}).identity() == config.identity()


def test_a_population_is_not_stopped_early_by_default() -> None:
    assert (ledgers.search(**PBT).stopping, ledgers.search(**PBT).rungs) == ("none", 5)


def test_a_config_survives_a_json_round_trip() -> None:
    config = ledgers.search(space={"use": ["masking"], "dimensions": {"optim.eps": [1e-8, 1e-6]}}, at_once=3)
    assert SearchConfig.model_validate_json(config.model_dump_json()) == config
