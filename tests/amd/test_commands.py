"""Tests for the commands shared by `amd` and `python -m …`."""

from __future__ import annotations

import inspect
from pkgutil import resolve_name
from typing import get_type_hints

import pytest

from amd.commands import TRAINING_COMMANDS
from amd.config import ConfigError
from amd.presets.load import PRESETS_BY_KIND
from amd.training.run_folder import RunResult


@pytest.mark.parametrize("name", TRAINING_COMMANDS)
def test_a_training_command_calls_a_function_that_accepts_its_config(name: str) -> None:
    command = TRAINING_COMMANDS[name]
    function = resolve_name(command.function)
    hints = get_type_hints(function)
    assert (hints["config"], hints["return"]) == (command.config, RunResult)
    assert list(inspect.signature(function).parameters) == ["config", "options"]


def test_every_training_command_has_presets_for_its_config() -> None:
    assert list(TRAINING_COMMANDS) == list(PRESETS_BY_KIND)
    for name, command in TRAINING_COMMANDS.items():
        assert {type(preset.config) for preset in PRESETS_BY_KIND[name].values()} == {command.config}


def test_an_invalid_config_raises_before_the_function_is_imported() -> None:
    command = TRAINING_COMMANDS["train"]._replace(function="nowhere:train")
    with pytest.raises(ConfigError, match=r"mask\.student_ratio"):
        command.run("demo-image-amd", None, {"mask.student_ratio": 2})
