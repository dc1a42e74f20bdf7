"""`python -m amd.training` as a process of its own."""

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


def written(config: TrainConfig, folder: Path) -> str:
    file = folder / "config.json"
    file.write_text(config.model_dump_json())
    return str(file)


def test_a_process_killed_with_signal_9_is_continued_to_the_bit_by_the_same_command(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="killed", schedule__steps=30, checkpoint__every_steps=4)
    args = ["--config", written(config, tmp_path), "--local", "--json", "tracking.log_every_steps=1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "amd.training", *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert child.stderr is not None
    seen = []
    for line in child.stderr:
        seen.append(line)
        if line.startswith("step "):
            break
    # One checkpoint must be there to go on from; the killing comes in mid-epoch or, at worst, between two steps.
    checkpoints = tmp_path / "storage" / "runs" / "killed" / "checkpoints"
    while child.poll() is None and not list(checkpoints.glob("*/manifest.json")):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "".join(seen)
    result = launch.train(config, local=True, quiet=True)
    assert (result.state, result.steps) == ("succeeded", 30)
    calm = with_overrides(config, {"name": "calm"})
    whole = launch.train(calm, local=True, quiet=True)
    assert_same_bits(final_state(result.run_folder, config), final_state(whole.run_folder, calm))
    assert listdir(str(checkpoints)) == ["step-00000028", "step-00000030"]


def test_it_ends_with_one_json_line_and_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tmp_path)
    code = main(["--config", written(config, tmp_path), "--local", "--json", "name=one", "schedule.steps=2"])
    (line,) = capsys.readouterr().out.splitlines()
    result = RunResult.model_validate_json(line)
    assert (code, result.state, result.steps, result.run_id) == (0, "succeeded", 2, "one")
    assert json.loads(line)["encoder_folder"].endswith("encoders/one")


def test_a_failed_run_has_exit_code_1_and_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tmp_path, optim__base_lr=1e30)
    assert main(["--config", written(config, tmp_path), "--local"]) == 1
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
def test_bad_input_has_exit_code_2_and_no_traceback(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", written(tiny_run(tmp_path), tmp_path), "--local", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_config_that_is_not_there_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.json"), "--local"]) == 2
    assert "none.json" in capsys.readouterr().err
