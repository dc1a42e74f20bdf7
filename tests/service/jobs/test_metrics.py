"""Tests for job metrics: downsampling, and series read from chunks that are each read only once."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.jobs import metrics
from service.jobs.metrics import MetricsCache, downsample

VALUES = st.lists(st.floats(allow_infinity=True, allow_nan=False), min_size=0, max_size=300)


@given(VALUES, st.integers(4, 60))
def test_downsampling_keeps_the_first_last_and_extreme_values_in_order(values: list[float], limit: int) -> None:
    kept = downsample(array("d", values), limit)
    assert len(kept) <= limit
    assert list(kept) == sorted(set(kept))
    if len(values) <= limit:
        assert list(kept) == list(range(len(values)))
        return
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert {min(values), max(values)} <= {values[index] for index in kept}


@pytest.mark.parametrize(("limit", "expected"), [(1, [0]), (2, [0, 9]), (3, [0, 9])])
def test_downsampling_to_fewer_than_four_values_keeps_the_first_and_last(limit: int, expected: list[int]) -> None:
    assert downsample([1.0] * 10, limit) == expected


def write_chunk(run: Path, number: int, lines: Sequence[dict[str, Any]]) -> None:
    (run / "metrics").mkdir(parents=True, exist_ok=True)
    (run / f"metrics/{number:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_series_contains_only_the_steps_at_which_its_metric_was_logged(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "time": 0.0, "loss/total": 2.0},
        {"step": 2, "time": 1.0, "loss/total": math.nan, "eval/knn_top1": 50.0},
    ]
    write_chunk(tmp_path, 0, lines)
    cache = MetricsCache()
    view = cache.view(str(tmp_path), [], 10)
    assert view.names == ["eval/knn_top1", "loss/total"]
    assert [(found.name, found.steps, found.values) for found in view.series] == [
        ("eval/knn_top1", [2], [50.0]),
        ("loss/total", [1, 2], [2.0, None]),
    ]
    assert [found.name for found in cache.view(str(tmp_path), ["loss/total"], 10).series] == ["loss/total"]
    assert [found.steps for found in cache.view(str(tmp_path), [], 10, since_step=2).series] == [[2], [2]]
    assert cache.view(str(tmp_path / "none"), [], 10).last_step is None


def test_a_nan_value_remains_visible_in_a_long_series(tmp_path: Path) -> None:
    write_chunk(tmp_path, 0, [{"step": step, "loss/total": math.nan if step == 500 else 1.0} for step in range(1000)])
    (series,) = MetricsCache().view(str(tmp_path), [], 20).series
    assert len(series.steps) <= 20
    assert series.points == 1000
    assert series.values[series.steps.index(500)] is None


def test_each_chunk_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_bytes = metrics.read_bytes
    monkeypatch.setattr(metrics, "read_bytes", lambda url: read.append(url) or read_bytes(url))
    cache = MetricsCache()
    for number in range(3):
        write_chunk(tmp_path, number, [{"step": number, "loss/total": 1.0}])
        assert cache.view(str(tmp_path), [], 10).series[0].steps == list(range(number + 1))
    assert [url[-12:] for url in read if url.endswith(".jsonl")] == ["000000.jsonl", "000001.jsonl", "000002.jsonl"]


def test_steps_repeated_by_a_resumed_run_have_their_later_values(tmp_path: Path) -> None:
    cache = MetricsCache()
    write_chunk(tmp_path, 0, [{"step": step, "loss/total": 1.0} for step in (2, 4, 6)])
    cache.view(str(tmp_path), [], 10)
    write_chunk(tmp_path, 1, [{"step": step, "loss/total": 2.0} for step in (4, 5)])
    view = cache.view(str(tmp_path), [], 10)
    assert (view.series[0].steps, view.series[0].values) == ([2, 4, 5, 6], [1.0, 2.0, 2.0, 1.0])
    assert view.last_step == 6


def test_a_new_run_with_the_same_name_replaces_the_cached_one(tmp_path: Path) -> None:
    cache = MetricsCache()
    for created, step in (("2026-01-01", 1), ("2026-01-02", 2)):
        write_chunk(tmp_path, 0, [{"step": step, "loss/total": 1.0}])
        (tmp_path / "run.json").write_text(json.dumps({"created": created}))
        assert cache.view(str(tmp_path), [], 10).series[0].steps == [step]


def test_the_cache_evicts_the_least_recently_requested_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MetricsCache(max_points=5)
    for name in ("a", "b", "c"):
        write_chunk(tmp_path / name, 0, [{"step": step, "loss/total": 1.0} for step in range(3)])
    for name in ("a", "b", "a", "c"):
        cache.view(str(tmp_path / name), [], 10)
    assert [Path(folder).name for folder in cache._runs] == ["c"]
    for name in ("a", "b"):
        assert cache.view(str(tmp_path / name), [], 10).series[0].points == 3
