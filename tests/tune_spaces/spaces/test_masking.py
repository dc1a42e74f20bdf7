"""Tests for the masking space: both ratios are clamped and snapped to whole cells."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd.config import ConfigError
from tests.support.runs.space_bases import BASES, space_of
from tune_spaces.spaces.masking import fit_ratios, ratio_for_count
from tune_spaces.spaces.space import config_of, grid, overrides_of

ratios = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("name", BASES)
def test_the_teacher_never_sees_less_than_the_student(name: str) -> None:
    for point in grid(space_of(name, use=["masking"])):
        config = config_of(space_of(name, use=["masking"]), point)
        assert config.mask.teacher_ratio <= config.mask.student_ratio
        assert config.teacher_hidden_cells <= config.student_hidden_cells
        assert 0 < config.student_hidden_cells < config.cells


@pytest.mark.parametrize("name", BASES)
def test_the_space_includes_symmetric_masks_and_a_teacher_that_sees_every_token(name: str) -> None:
    space = space_of(name, use=["masking"])
    configs = [config_of(space, point) for point in grid(space)]
    assert any(config.teacher_hidden_cells == 0 for config in configs)
    for config in configs:
        twin = (config.student_hidden_cells, config.student_hidden_cells)
        assert twin in [(other.student_hidden_cells, other.teacher_hidden_cells) for other in configs]


@pytest.mark.parametrize("name", ["demo-image-amd", "tiny video", "four cells"])
def test_each_cell_count_on_a_small_grid_is_offered_once(name: str) -> None:
    base = BASES[name]
    for dimension in space_of(name, use=["masking"]).dimensions.values():
        counts = [base.mask.hidden_cells(ratio, base.cells) for ratio in dimension.choices or ()]
        assert len(set(counts)) == len(counts)


@given(name=st.sampled_from(sorted(BASES)), student=ratios, teacher=ratios)
def test_any_pair_of_ratios_is_converted_to_a_valid_pair(name: str, student: float, teacher: float) -> None:
    base = BASES[name]
    space = space_of(name, dimensions={"masking.student_ratio": [0.5, 0.75], "mask.teacher_ratio": [0.0, 0.5]})
    config = config_of(space, {"masking.student_ratio": student, "mask.teacher_ratio": teacher})
    assert fit_ratios(config.mask.student_ratio, config.mask.teacher_ratio, base) == (
        config.mask.student_ratio,
        config.mask.teacher_ratio,
    )


def test_valid_ratios_are_unchanged() -> None:
    assert fit_ratios(0.9, 0.75, BASES["k400-vit-b"]) == (0.9, 0.75)
    assert fit_ratios(0.9, 0.0, BASES["k400-vit-b"]) == (0.9, 0.0)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (0.75, 0.9, (0.75, 0.75)),  # clamped
        (0.78, 0.76, (0.78, 0.78)),  # both hide 12 of 16
        (0.01, 0.0, (0.0625, 0.0)),  # the smallest ratio that hides a cell
    ],
)
def test_ratios_are_clamped_and_snapped(student: float, teacher: float, expected: tuple[float, float]) -> None:
    assert fit_ratios(student, teacher, BASES["demo-image-amd"]) == expected


@given(cells=st.integers(1, 5000), data=st.data())
def test_a_ratio_derived_from_a_count_hides_exactly_that_many_cells(cells: int, data: Any) -> None:
    count = data.draw(st.integers(0, cells - 1))
    assert int(ratio_for_count(count, cells) * cells) == count


def test_custom_ratios_are_clamped_too() -> None:
    space = space_of("tiny video", dimensions={"mask.teacher_ratio": [0.0, 0.9]})
    assert overrides_of(space, {"mask.teacher_ratio": 0.9}) == {"mask.teacher_ratio": 0.75}
    space = space_of("tiny video", dimensions={"mask.student_ratio": {"low": 0.3, "high": 0.95}})
    assert overrides_of(space, {"mask.student_ratio": 0.5}) == {"mask.student_ratio": 0.5, "mask.teacher_ratio": 0.5}


def test_ratios_are_snapped_to_the_cells_of_the_masking_strategy() -> None:
    base = {"mask.strategy": ["tube", "random"], "masking.student_ratio": [0.51, 0.75], "masking.teacher_ratio": [0.5]}
    space = space_of("tiny video", dimensions=base)  # tube: 16 cells, random: 32
    tube, random = (
        config_of(space, {"mask.strategy": strategy, "masking.student_ratio": 0.54, "masking.teacher_ratio": 0.5})
        for strategy in ("tube", "random")
    )
    assert tube.mask.teacher_ratio == tube.mask.student_ratio == 0.54
    assert random.mask.teacher_ratio == 0.5


@pytest.mark.parametrize("parameter", ["masking.teacher_ratio", "mask.teacher_ratio"])
@pytest.mark.parametrize("value", [1.0, -0.1, "half"])
def test_an_invalid_ratio_is_rejected(parameter: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"teacher_ratio=.*must be"):
        space_of("tiny video", dimensions={parameter: [0.5, value]})
