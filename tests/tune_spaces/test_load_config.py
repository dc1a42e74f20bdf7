"""Tests for loading a sweep config from a preset or a file, and for the errors it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from amd.config import ConfigError, with_overrides
from amd.presets.pretraining import PRESETS
from tests.support.runs import ledgers
from tests.support.runs.configs import tiny_video_config
from tune_spaces.load_config import load_search

PRESET = "demo-image-amd"
BASE = PRESETS[PRESET].config
MASKING = {"space": {"use": ["masking"]}}


def file(folder: Path, values: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


def test_a_preset_can_be_the_base() -> None:
    assert load_search(PRESET, None, MASKING).train == BASE


def test_a_file_can_specify_a_preset_with_overrides(tmp_path: Path) -> None:
    values = {**MASKING, "preset": PRESET, "overrides": {"optim.base_lr": 0.25, "budget.trials": 7}, "seeds": 2}
    config = load_search(None, file(tmp_path, values), {})
    assert config.train == with_overrides(BASE, {"optim.base_lr": 0.25})
    assert (config.budget.trials, config.seeds) == (7, 2)


def test_the_preset_option_overrides_the_preset_in_the_file(tmp_path: Path) -> None:
    url = file(tmp_path, {**MASKING, "preset": "demo-video-amd"})
    assert load_search(PRESET, url, {}).train == BASE
    assert load_search(None, url, {}).train == PRESETS["demo-video-amd"].config


def test_a_file_can_contain_a_complete_run(tmp_path: Path) -> None:
    train = tiny_video_config()
    config = load_search(None, file(tmp_path, {**MASKING, "train": train.model_dump(mode="json")}), {})
    assert config.train == train


def test_the_config_written_by_a_sweep_can_be_loaded(tmp_path: Path) -> None:
    config = ledgers.search(space={"dimensions": {"optim.eps": [1e-8, 1e-6]}}, algorithm="tpe", at_once=3)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert load_search(None, str(path), {}) == config


def test_overrides_take_precedence_over_the_file(tmp_path: Path) -> None:
    values = {**MASKING, "preset": PRESET, "overrides": {"optim.base_lr": 0.25, "seeds": 3}}
    config = load_search(None, file(tmp_path, values), {"optim.base_lr": 0.5, "seeds": 2})
    assert (config.train.optim.base_lr, config.seeds) == (0.5, 2)


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("optim.base_lr", 0.5, "train.optim.base_lr"),
        ("mask.teacher_ratio", 0.25, "train.mask.teacher_ratio"),
        ("objective.layers.0.student", 1, "train.objective.layers.0.student"),
        ("data.max_bad_fraction", 0.5, "train.data.max_bad_fraction"),
        ("train.seed", 4, "train.seed"),
        ("train.name", "base", "train.name"),
        ("seed", 4, "seed"),
        ("seeds", 4, "seeds"),
        ("name", "mine", "name"),
        ("storage", "/runs", "storage"),
        ("budget.hours", 1.5, "budget.hours"),
        ("space.use", ["alignment"], "space.use"),
        ("algorithm", "tpe", "algorithm"),
    ],
)
def test_overrides_are_applied_to_the_sweep_or_its_run(key: str, value: Any, where: str) -> None:
    before = load_search(PRESET, None, MASKING).model_dump(mode="json")
    after = load_search(PRESET, None, {**MASKING, key: value}).model_dump(mode="json")
    assert changes(before, after) == {where: value}


def changes(before: Any, after: Any, where: str = "") -> dict[str, Any]:
    """Return the dotted keys whose values differ."""
    if before == after:
        return {}
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(key, before.get(key), after.get(key)) for key in {**before, **after}]
    elif isinstance(before, list) and isinstance(after, list) and isinstance(before[0], dict):
        pairs = [(str(place), old, new) for place, (old, new) in enumerate(zip(before, after, strict=True))]
    else:
        return {where: after}
    return {
        key: value for part, old, new in pairs for key, value in changes(old, new, f"{where}.{part}".strip(".")).items()
    }


def test_a_probe_override_is_applied_to_the_run() -> None:
    data = {"probe.data.train": "demo:digits/probe", "probe.data.test": "demo:digits/select"}
    probe = load_search(PRESET, None, {**MASKING, **data}).train.probe
    assert probe is not None
    assert (probe.data.train, probe.data.test) == ("demo:digits/probe", "demo:digits/select")


MISTAKES: list[tuple[str | None, Any, dict[str, Any], str]] = [
    (None, None, MASKING, "train: required: this is the run that the sweep varies; pass --preset NAME"),
    (None, MASKING, {}, "train: required: this is the run that the sweep varies; pass --preset NAME"),
    (None, {}, {}, "train: required: this is the run that the sweep varies"),
    ("demo-imge-amd", None, MASKING, "preset='demo-imge-amd': unknown; did you mean demo-image-amd?"),
    (None, {**MASKING, "preset": "demo-imge-amd"}, {}, "did you mean demo-image-amd?"),
    (PRESET, {**MASKING, "train": {}}, {}, "train: the file contains a complete run, but a preset is set too"),
    (None, {**MASKING, "train": {}, "preset": PRESET}, {}, "train: the file contains a complete run, but a preset"),
    (None, {**MASKING, "preset": PRESET, "overrides": ["optim.base_lr=1"]}, {}, "overrides=['optim.base_lr=1']: must"),
    (PRESET, None, {}, "space: required, but not set"),
    (
        PRESET,
        None,
        {**MASKING, "optim.baselr": 1},
        "train.optim.baselr: unknown key; did you mean train.optim.base_lr?",
    ),
    (PRESET, None, {**MASKING, "sed": 1}, "sed: unknown key; did you mean seed?"),
    (PRESET, None, {**MASKING, "seeds": 0}, "seeds=0: "),
    (PRESET, None, {**MASKING, "mask.teacher_ratio": 0.9}, "train.mask.teacher_ratio=0.9 must not be above"),
    (PRESET, None, {**MASKING, "seeds.more": 1}, "seeds={'more': 1}: must be a valid integer"),
    (PRESET, "a list\nand: more", {}, "neither JSON nor YAML"),
    (PRESET, "- masking", {}, "must be an object"),
]


@pytest.mark.parametrize(("preset", "values", "overrides", "expected"), MISTAKES)
def test_each_config_error_is_reported_on_one_line(
    tmp_path: Path, preset: str | None, values: Any, overrides: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_search(preset, None if values is None else file(tmp_path, values), overrides)
    (problem,) = error.value.problems
    assert expected in problem


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_search(PRESET, str(tmp_path / "nowhere.yaml"), MASKING)


def test_arguments_are_not_modified(tmp_path: Path) -> None:
    overrides = {**MASKING, "optim.base_lr": 0.5}
    before = json.dumps(overrides)
    load_search(PRESET, None, overrides)
    assert json.dumps(overrides) == before
    assert PRESETS[PRESET].config == BASE


def test_a_dimension_can_be_set_by_its_dotted_name() -> None:
    fields = {"space.use": ["masking"], "space.dimensions.optim.eps": [1e-8, 1e-6]}
    config = load_search(PRESET, None, {**fields, "space.dimensions.optim.base_lr": {"low": 1e-4, "high": 1e-2}})
    assert list(config.space.dimensions) == ["optim.eps", "optim.base_lr"]
    assert config.space.dimensions["optim.eps"].choices == (1e-8, 1e-6)


def test_a_dimension_on_the_command_line_overrides_only_the_same_dimension_in_the_file(tmp_path: Path) -> None:
    there = {"preset": PRESET, "space": {"dimensions": {"optim.eps": [1e-8, 1e-6], "optim.clip_norm": [0.1, 1.0]}}}
    config = load_search(None, file(tmp_path, there), {"space.dimensions.optim.eps": [1e-7, 1e-5]})
    assert config.space.dimensions["optim.eps"].choices == (1e-7, 1e-5)
    assert config.space.dimensions["optim.clip_norm"].choices == (0.1, 1.0)
