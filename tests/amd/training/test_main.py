"""Tests for `python -m amd.training`: exit codes, output, and resuming a killed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amd.config import TrainConfig, with_overrides
from amd.storage import listdir
from amd.training.__main__ import main
from amd.training.run_folder import RunResult
from amd.training.runs import launch
from tests.support.runs.tiny_runs import assert_same_bits, final_state, tiny_run


def write_config(config: TrainConfig, folder: Path) -> str:
    file = folder / "config.json"
    file.write_text(config.model_dump_json())
    return str(file)


def test_a_run_killed_with_sigkill_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="killed", schedule__steps=30, checkpoint__every_steps=4)
    args = ["--config", write_config(config, tmp_path), "--local", "--json", "tracking.log_every_steps=1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "amd.training", *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        if line.startswith("step "):
            break
    # Wait for a checkpoint to resume from. The kill then hits the middle of an epoch or the gap between two steps.
    checkpoints = tmp_path / "storage" / "runs" / "killed" / "checkpoints"
    while child.poll() is None and not list(checkpoints.glob("*/manifest.json")):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "".join(lines)
    result = launch.train(config, local=True, quiet=True)
    assert (result.state, result.steps) == ("succeeded", 30)
    uninterrupted_config = with_overrides(config, {"name": "uninterrupted"})
    uninterrupted = launch.train(uninterrupted_config, local=True, quiet=True)
    assert_same_bits(
        final_state(result.run_folder, config), final_state(uninterrupted.run_folder, uninterrupted_config)
    )
    assert listdir(str(checkpoints)) == ["step-00000028", "step-00000030"]


def test_a_successful_run_prints_one_json_line_and_exits_with_code_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(tmp_path)
    code = main(["--config", write_config(config, tmp_path), "--local", "--json", "name=one", "schedule.steps=2"])
    (line,) = capsys.readouterr().out.splitlines()
    result = RunResult.model_validate_json(line)
    assert (code, result.state, result.steps, result.run_id) == (0, "succeeded", 2, "one")
    assert json.loads(line)["encoder_folder"].endswith("encoders/one")


def test_a_failed_run_prints_a_message_and_exits_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(tmp_path, optim__base_lr=1e30)
    assert main(["--config", write_config(config, tmp_path), "--local"]) == 1
    assert "failed (nan_loss): step 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "nonsense"),
        (["optim.batch_size=1000"], "optim.batch_size=1000"),
        (["mask.student_ratio=2"], "mask.student_ratio"),
        (["name=../../x"], "name"),
    ],
)
def test_invalid_input_exits_with_code_2_and_no_traceback(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", write_config(tiny_run(tmp_path), tmp_path), "--local", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_config_file_exits_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.json"), "--local"]) == 2
    assert "none.json" in capsys.readouterr().err
