from __future__ import annotations

import pytest

from amd.bench import data, step
from amd.bench.tables import ROWS
from tests.support.service.command import amd


def test_bench_step_prints_a_table_of_results(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "bench_step", lambda config, batch, steps: {"batch": batch, "matmul_fraction": 0.51234})
    code, out, _ = amd(monkeypatch, capfd, "bench", "step", "--preset", "demo-video-amd", "--batch", "3")
    assert code == 0
    assert "One training step" in out
    for key, value in (("preset", "demo-video-amd"), ("batch", "3"), ("matmul_fraction", "0.5123")):
        assert any(key in line and value in line for line in out.splitlines())


def test_bench_data_prints_one_column_per_data_set(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    measured = {key: 2 for key, _ in ROWS.values()}
    sets = [{**measured, "name": "mine"}, {**measured, "name": "theirs", "decord_ms": None}]
    monkeypatch.setattr(data, "bench_data", lambda *args, **options: {"frames": 16, "size": [224, 224], "sets": sets})
    code, out, _ = amd(monkeypatch, capfd, "bench", "data")
    assert code == 0
    assert "mine" in out
    assert "theirs" in out
    (row,) = (line for line in out.splitlines() if " bare decord " in line and "speed" not in line)
    assert "2.00 ms" in row
    assert "-" in row
