"""Tests for job metrics: downsampling and series."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.jobs.metrics import downsample, series

VALUES = st.lists(st.floats(allow_infinity=True, allow_nan=True), min_size=0, max_size=300)


@given(VALUES, st.integers(4, 60))
def test_downsampling_keeps_the_first_last_and_extreme_points_in_order(values: list[float], limit: int) -> None:
    points = list(enumerate(values))
    kept = downsample(points, limit)
    assert len(kept) <= limit
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert all(values[step] is value for step, value in kept)
    if len(points) <= limit:
        assert list(kept) == points
        return
    assert kept[0][0] == 0
    assert kept[-1][0] == len(points) - 1
    finite = [value for value in values if not math.isnan(value)]
    if finite:
        assert min(finite) in [value for _, value in kept]
    highest = math.nan if len(finite) < len(values) else max(finite)
    assert any(value == highest or math.isnan(value) == math.isnan(highest) for _, value in kept)


@pytest.mark.parametrize("limit", [2, 3])
def test_downsampling_to_fewer_than_four_points_keeps_the_first_and_last(limit: int) -> None:
    assert downsample([(step, 1.0) for step in range(10)], limit)[:: limit - 1 or 1][0] == (0, 1.0)
    assert len(downsample([(step, 1.0) for step in range(10)], limit)) <= limit


def test_a_series_contains_only_the_steps_at_which_its_metric_was_logged() -> None:
    lines = [
        {"step": 1, "time": 0.0, "loss/total": 2.0},
        {"step": 2, "time": 1.0, "loss/total": math.nan, "eval/knn_top1": 50.0},
    ]
    view = series(lines, [], 10)
    assert view.names == ["eval/knn_top1", "loss/total"]
    assert [(found.name, found.steps, found.values) for found in view.series] == [
        ("eval/knn_top1", [2], [50.0]),
        ("loss/total", [1, 2], [2.0, None]),
    ]
    assert [found.name for found in series(lines, ["loss/total"], 10).series] == ["loss/total"]
    assert series([], [], 10).last_step is None
