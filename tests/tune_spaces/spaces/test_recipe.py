"""Tests for the recipe space: learning rate and warm-up relative to the base config."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd.config import ConfigError, with_overrides
from tests.support.runs.space_bases import BASES, space_of
from tune_spaces.spaces.space import Space, config_of, overrides_of


@given(name=st.sampled_from(sorted(BASES)), scale=st.floats(0.3, 3))
def test_the_peak_and_final_learning_rates_are_scaled(name: str, scale: float) -> None:
    base = BASES[name]
    optim = config_of(Space({}, base), {"recipe.lr_scale": scale}).optim
    assert optim.base_lr == pytest.approx(base.optim.base_lr * scale)
    assert optim.min_lr == pytest.approx(base.optim.min_lr * scale)


@pytest.mark.parametrize(
    ("name", "fraction", "expected"),
    [
        ("k400-vit-b", 0.1, {"schedule.warmup_epochs": 20}),
        ("k400-vit-b", 0.05, {}),
        ("k400-vit-b", 0.0, {"schedule.warmup_epochs": 0}),
        ("demo-image-amd", 0.2, {"schedule.warmup_steps": 100}),
        ("demo-image-amd", 0.1, {}),
        ("tiny video", 0.0, {}),  # no override, because there is no warm-up by default
        ("tiny video", 0.5, {"schedule.warmup_steps": 2}),
        ("warm-up in epochs, run in steps", 0.5, {"schedule.warmup_epochs": None, "schedule.warmup_steps": 2}),
        ("warm-up in epochs, run in steps", None, {}),
    ],
)
def test_warmup_fraction_is_converted_to_the_unit_of_the_run_length(
    name: str, fraction: Any, expected: dict[str, Any]
) -> None:
    assert overrides_of(Space({}, BASES[name]), {"recipe.warmup_fraction": fraction}) == expected


@pytest.mark.parametrize("name", BASES)
def test_each_warmup_length_is_offered_once(name: str) -> None:
    space = space_of(name, use=["recipe"])
    choices = space.dimensions["recipe.warmup_fraction"].choices or ()
    found = [config_of(space, {"recipe.warmup_fraction": fraction}).digest() for fraction in choices]
    assert len(set(found)) == len(found)


@given(length=st.integers(1, 2000), data=st.data())
def test_the_base_warmup_fraction_produces_no_overrides(length: int, data: Any) -> None:
    warmup = data.draw(st.integers(0, length))
    base = with_overrides(BASES["k400-vit-b"], {"schedule.epochs": length, "schedule.warmup_epochs": warmup})
    assert overrides_of(Space({}, base), {"recipe.warmup_fraction": warmup / length}) == {}


def test_lr_scale_multiplies_a_custom_learning_rate() -> None:
    space = space_of("k400-vit-b", use=["recipe"], dimensions={"optim.base_lr": [1e-3, 2e-3]})
    assert config_of(space, {"optim.base_lr": 2e-3, "recipe.lr_scale": 0.5}).optim.base_lr == 1e-3


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("recipe.lr_scale", 0), ("recipe.lr_scale", "fast"), ("recipe.warmup_fraction", 1.5), ("optim.clip_norm", 0)],
)
def test_the_error_for_an_invalid_value_starts_with_its_parameter(parameter: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"space\.dimensions\.{parameter}.*{value}"):
        space_of("tiny video", dimensions={parameter: [value, 0.5]})
