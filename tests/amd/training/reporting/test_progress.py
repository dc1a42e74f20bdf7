from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from amd.training.reporting import progress
from amd.training.reporting.progress import LineWatcher, ProgressBarWatcher, duration

START = {
    "kind": "start",
    "run_id": "one",
    "steps": 100,
    "done": 40,
    "epochs": 12.5,
    "samples": 64,
    "batch": 8,
    "clips": 16,
    "lr": 2.4e-3,
    "workers": 2,
    "workers_before": 3,
    "micro_batches": 2,
    "parameters": {"encoder": 22_030_000, "student": 75_200_000, "teacher": 303_000_000},
    "clip_tokens": 1568,
    "visible_tokens": {"student": 160, "teacher": 392},
    "gflops_per_clip": 421.2,
    "device": "cuda",
    "precision": "bf16",
    "seconds": 12_000.0,
}
VALUES = {"loss/total": 1.25, "optim/lr": 1e-3, "speed/samples_per_s": 80.0, "time/step_s": 0.2, "time/data_s": 0.05}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_log_starts_with_a_run_summary_followed_by_one_line_per_step(clock: list[float]) -> None:
    out = io.StringIO()
    lines = LineWatcher(out, seconds=0)
    lines.on_event(START)
    for seconds, step in ((0, 50), (1, 51), (10, 60), (50, 100)):
        clock[0] = seconds
        lines.on_event({"kind": "step", "step": step, "values": VALUES})
    lines.on_event({"kind": "warning", "text": "collapsing"})
    text = out.getvalue()
    for expected in (
        "continued after step 40",
        "100 steps, 12.5 epochs of 64 samples",
        "8 samples of 16 clips: 2 workers on cuda, 2 micro-batches each, bf16",
        "peak lr    0.0024",
        "2 workers instead of 3: batch and learning rate are kept",
        "encoder 22.0 M, student 75.2 M, teacher 303.0 M",
        "1568 a clip; visible to student 160, teacher 392",
        "estimate   3 h 20 min",
        "step 50/100  loss 1.2500  lr 1.00e-03  80.0 clips/s  waiting for data 25%",
        "WARNING collapsing",
    ):
        assert expected in text
    lines_left = [line.partition("25%")[2].strip() for line in text.splitlines() if line.startswith("step ")]
    assert lines_left == ["", "", "40 s left", ""], "the pace is unknown in the first seconds"


def test_a_terminal_shows_a_progress_bar() -> None:
    out = io.StringIO()
    bar = ProgressBarWatcher(Console(file=out, force_terminal=True, width=160))
    bar.on_event(START)
    bar.on_event({"kind": "step", "step": 70, "values": VALUES})
    bar.close()
    assert "70/100" in out.getvalue()
    assert "waiting for data 25%" in out.getvalue()


def test_the_progress_file_keeps_the_training_of_the_teacher(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, training = tmp_path / "progress.json", {"run_id": "teacher-1", "steps": 3, "seconds": 7.5, "reused": False}
    monkeypatch.setenv(progress.PROGRESS_FILE, str(file))
    watcher = progress.choose_watcher(quiet=True)
    watcher.on_event({**START, "run_id": "teacher-1"})
    assert json.loads(file.read_text())["trained_teacher"] is None
    watcher.on_event({"kind": "teacher", "training": training})
    watcher.on_event(START)
    watcher.on_event({"kind": "step", "step": 100, "values": VALUES})
    written = json.loads(file.read_text())
    assert (written["run"], written["step"], written["trained_teacher"]) == ("one", 100, training)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (42, "42 s"), (420, "7 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")]
)
def test_durations_are_human_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
