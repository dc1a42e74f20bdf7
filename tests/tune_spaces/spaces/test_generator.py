"""Tests for the generator space: depth, width and heads."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd.config import ConfigError, with_overrides
from tests.support.runs.space_bases import BASES, NO_GENERATION, space_of
from tune_spaces.spaces.space import Space, config_of, grid, overrides_of


@pytest.mark.parametrize("name", sorted(set(BASES) - NO_GENERATION))
def test_different_points_describe_different_runs(name: str) -> None:
    space = space_of(name, use=["generator"])
    digests = [config_of(space, point).digest() for point in grid(space)]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("name", sorted(NO_GENERATION))
def test_a_base_without_generation_alignment_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match=r"all produce the same run \(this config has no generation alignment\)"):
        space_of(name, use=["generator"])


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("k400-vit-s", "student", {"student.generator.width": 384}),  # the default, 384 // 64 = 6 heads
        ("k400-vit-s", "half", {"student.generator.width": 512}),
        ("k400-vit-s", "teacher", {}),
        ("k400-vit-s", 1024, {}),
        # The default, 3 heads, does not divide 200.
        ("k400-vit-s", 200, {"student.generator.width": 200, "student.generator.heads": 4}),
        ("demo-image-amd", "student", {"student.generator.width": 64, "student.generator.heads": 2}),  # head size 32
        ("a wide generator", 64, {"student.generator.width": None, "student.generator.heads": 2}),
        ("a wide generator", 96, {}),
    ],
)
def test_a_width_is_paired_with_a_head_count_that_divides_it(name: str, width: Any, expected: dict[str, Any]) -> None:
    assert overrides_of(Space({}, BASES[name]), {"generator.width": width}) == expected


@given(name=st.sampled_from(sorted(BASES)), width=st.integers(1, 64).map(lambda parts: 16 * parts))
def test_any_custom_width_gets_heads_that_divide_it(name: str, width: int) -> None:
    config = config_of(Space({}, BASES[name]), {"student.generator.width": width})
    assert config.generator_width % config.generator_heads == 0


def test_a_custom_head_count_is_preserved() -> None:
    space = Space({}, BASES["tiny video"])
    assert config_of(space, {"student.generator.width": 48, "student.generator.heads": 6}).generator_heads == 6
    with pytest.raises(ConfigError, match=r"student\.generator\.heads=5 must divide student\.generator\.width=48"):
        config_of(space, {"student.generator.width": 48, "student.generator.heads": 5})


def test_generator_sizes_have_no_effect_without_generation_alignment() -> None:
    base = BASES["k400-vit-s"]
    symmetric = {"masking.teacher_ratio": 0.95}
    point = {**symmetric, "student.generator.depth": 4, "generator.width": "half"}
    assert config_of(Space({}, base), point).digest() == config_of(Space({}, base), symmetric).digest()


def test_a_width_can_be_derived_from_any_teacher() -> None:
    base = with_overrides(BASES["k400-vit-s"], {"teacher.encoder.size": "B", "objective.layers.1.teacher": 12})
    assert config_of(Space({}, base), {"generator.width": "half"}).generator_width == 384


@pytest.mark.parametrize("width", ["quarter", 2, 7.5, True])
def test_an_invalid_width_is_rejected(width: object) -> None:
    with pytest.raises(
        ConfigError, match=r"generator\.width=.*must be one of teacher, half, student, or an integer of at least 4"
    ):
        space_of("tiny video", dimensions={"generator.width": ["teacher", width]})
