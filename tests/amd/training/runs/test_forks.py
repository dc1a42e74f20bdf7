"""Tests for runs that start from a checkpoint of another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from amd.config import ConfigError, TrainConfig, with_overrides
from amd.storage import join, read_json
from amd.training.checkpoints.listing import CHECKPOINTS, checkpoint_url
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.run_folder import RunResult, run_folder
from amd.training.runs.forks import find_parent
from amd.training.runs.launch import train
from tests.support.runs.tiny_runs import tiny_run

STEPS = 12


def losses(config: TrainConfig, run_id: str) -> dict[int, float]:
    assert config.storage is not None
    lines = read_metrics(run_folder(config.storage, run_id))
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


def run(config: TrainConfig, run_id: str, **options: Any) -> RunResult:
    return train(config, run_id=run_id, local=True, quiet=True, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Return the config of a run named `original`, which has a checkpoint at step 4."""
    config = tiny_run(tmp_path_factory.mktemp("original"), checkpoint__pin_steps=[4])
    assert run(config, "original").state == "succeeded"
    return config


def checkpoint(config: TrainConfig, step: int = 4, run_id: str = "original") -> str:
    assert config.storage is not None
    return checkpoint_url(join(run_folder(config.storage, run_id), CHECKPOINTS), step)


def test_a_fork_without_changes_repeats_the_rest_of_the_original_run(original: TrainConfig) -> None:
    fork = with_overrides(original, {"start": checkpoint(original)})
    assert run(fork, "same").steps == STEPS
    expected = {step: loss for step, loss in losses(original, "original").items() if step > 4}
    assert losses(fork, "same") == pytest.approx(expected)
    assert read_json(join(run_folder(str(fork.storage), "same"), "run.json"))["parent"] == "original"


def test_a_fork_follows_its_own_config_and_resumes_after_its_parent_was_deleted(original: TrainConfig) -> None:
    changes = {"start": checkpoint(original, run_id="copy"), "schedule.steps": 16, "optim.base_lr": 1e-6}
    fork, folder = with_overrides(original, changes), Path(run_folder(str(original.storage), "copy"))
    shutil.copytree(folder.with_name("original"), folder)
    assert run(fork, "longer", until=8).state == "paused"
    shutil.rmtree(folder)
    assert run(fork, "longer").steps == 16
    assert min(losses(fork, "longer")) > 4
    assert losses(fork, "longer")[12] != losses(original, "original")[12]


@pytest.mark.parametrize(
    ("step", "changes", "problem"),
    [
        (5, {}, "there is no such checkpoint"),
        (4, {"schedule.steps": 4}, "the run has only 4 steps"),
        (4, {"student.encoder.depth": 1, "objective.layers": [{"student": 1, "teacher": 1}]}, "its weights do not fit"),
    ],
)
def test_a_missing_or_incompatible_checkpoint_is_rejected(
    original: TrainConfig, step: int, changes: dict[str, Any], problem: str
) -> None:
    fork = with_overrides(original, {**changes, "start": checkpoint(original, step)})
    with pytest.raises(ConfigError, match=problem):
        find_parent(fork, str(fork.storage), "new", fork.schedule.steps or 0)


@pytest.mark.parametrize("start", ["original", "/elsewhere/runs/original/checkpoints/step-00000004", "step-4"])
def test_only_checkpoints_under_the_storage_root_are_accepted(original: TrainConfig, start: str) -> None:
    fork = with_overrides(original, {"start": start})
    with pytest.raises(ConfigError, match="must be a checkpoint of a run below"):
        find_parent(fork, str(fork.storage), "new", STEPS)


def test_the_starting_checkpoint_changes_the_config_digest(original: TrainConfig) -> None:
    assert original.digest() != with_overrides(original, {"start": checkpoint(original)}).digest()
    assert "start" in original.model_dump()
    assert find_parent(original, str(original.storage), "new", STEPS) is None
