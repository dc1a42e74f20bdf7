"""Tests for complete in-process runs whose teacher is trained first, from a preset."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from amd.artifacts.weights import load_encoder
from amd.config import ConfigError, TrainConfig, with_overrides
from amd.presets import pretraining
from amd.presets.preset import Preset
from amd.presets.teachers import teacher_recipe
from amd.storage import join, listdir, read_json
from amd.training.lease import Lease
from amd.training.reporting.progress import NullWatcher
from amd.training.run_folder import RunResult, TeacherTraining, run_folder
from amd.training.runs import launch
from amd.training.runs.teachers import teacher_id
from tests.support.runs.configs import mae, tiny_image_config
from tests.support.runs.tiny_runs import tiny_run


def train(config: TrainConfig) -> RunResult:
    return launch.train(config, local=True, quiet=True)


def tiny_recipe(folder: Path) -> TrainConfig:
    """Return a config that trains the tiny teacher in 3 steps."""
    wide = {"width": 64, "depth": 4, "heads": 2, "class_token": True, "positions": "sincos_2d"}
    return mae(tiny_image_config(), student__encoder=wide, data__train=str(folder / "images"), schedule__steps=3)


def test_a_teacher_preset_is_trained_first_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(NullWatcher, "log", lambda self, text: logged.append(text))
    monkeypatch.setattr(launch, "choose_watcher", lambda quiet: NullWatcher())
    config = tiny_run(tmp_path)
    recipe = tiny_recipe(tmp_path)
    monkeypatch.setitem(pretraining.PRESETS, "tiny-teacher", Preset("tiny-teacher", "", "", "", recipe))
    teacher_from_preset = {"teacher.weights": None, "teacher.preset": "tiny-teacher", "teacher.overrides": {"seed": 5}}
    student = train(with_overrides(config, {**teacher_from_preset, "name": "student"}))
    assert student.state == "succeeded"
    assert [text for text in logged if text.startswith("the teacher is trained (3 steps in ")]
    runs = listdir(join(config.storage, "runs"))
    (teacher,) = [name for name in runs if name.startswith("tiny-teacher-")]
    assert read_json(join(config.storage, "runs", teacher, "config.json"))["seed"] == 5
    _, card = load_encoder(student.encoder_folder)
    assert (card.teacher["preset"], card.teacher["run"], card.weights_license) == ("tiny-teacher", teacher, None)
    teacher_result = read_json(join(config.storage, "runs", teacher, "result.json"))
    other = train(with_overrides(config, {**teacher_from_preset, "name": "other", "seed": 1}))
    assert other.state == "succeeded"
    assert listdir(join(config.storage, "runs")) == sorted([*runs, "other"])
    assert read_json(join(config.storage, "runs", teacher, "result.json")) == teacher_result
    trained = {"run_id": teacher, "steps": 3, "seconds": teacher_result["seconds"]}
    assert student.teacher == TeacherTraining(**trained, reused=False)
    assert other.teacher == TeacherTraining(**trained, reused=True)


def test_a_teacher_that_an_earlier_attempt_of_the_job_trained_is_not_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = Preset("tiny-teacher", "", "", "", tiny_recipe(tmp_path))
    monkeypatch.setitem(pretraining.PRESETS, "tiny-teacher", preset)
    config = with_overrides(tiny_run(tmp_path), {"teacher.weights": None, "teacher.preset": "tiny-teacher"})
    for job, name, is_reused in (("job-1", "first", False), ("job-1", "second", False), ("job-2", "third", True)):
        monkeypatch.setenv("AMD_JOB", job)
        assert train(with_overrides(config, {"name": name})).teacher.reused is is_reused


def test_a_teacher_preset_is_trained_on_the_data_of_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path)
    recipe = with_overrides(tiny_recipe(tmp_path), {"data.train": "unset:"})
    monkeypatch.setitem(pretraining.PRESETS, "tiny-teacher", Preset("tiny-teacher", "", "", "", recipe))
    student = {"teacher.weights": None, "teacher.preset": "tiny-teacher", "name": "student"}
    assert train(with_overrides(config, student)).state == "succeeded"
    (teacher,) = [name for name in listdir(join(config.storage, "runs")) if name.startswith("tiny-teacher-")]
    runs = {name: read_json(join(config.storage, "runs", name, "config.json")) for name in (teacher, "student")}
    assert runs[teacher]["data"]["train"] == config.data.train
    assert runs["student"]["teacher"]["overrides"] == {"data.train": config.data.train}


def test_a_raised_limit_on_unreadable_samples_continues_the_run_and_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_overrides(tiny_recipe(tmp_path), {"schedule.steps": 6})
    monkeypatch.setitem(pretraining.PRESETS, "tiny-teacher", Preset("tiny-teacher", "", "", "", recipe))
    config = tiny_run(tmp_path, name="student", teacher__weights=None, teacher__preset="tiny-teacher")
    (tmp_path / "images" / "a" / "000.png").write_bytes(b"not an image")
    result = train(config)
    assert (result.state, result.reason) == ("failed", "teacher_load_failed")
    assert "fix them, remove them from the data, or raise the limit" in result.message
    assert train(with_overrides(config, {"data.max_bad_fraction": 0.1})).state == "succeeded"


def test_an_invalid_teacher_leaves_no_run_whose_name_would_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = Preset("tiny-teacher", "", "", "", tiny_recipe(tmp_path))
    monkeypatch.setitem(pretraining.PRESETS, "tiny-teacher", preset)
    config = tiny_run(tmp_path, name="student", teacher__weights=None, teacher__preset="tiny-teacher")
    for wrong in ({"schedule.warmup_steps": 50}, {"optim.batch_size": 1000}):
        with pytest.raises(ConfigError):
            train(with_overrides(config, {"teacher.overrides": wrong}))
    assert not listdir(join(config.storage, "runs", "student"))
    assert train(config).state == "succeeded"


def test_a_teacher_preset_with_a_mismatched_encoder_is_rejected_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path)
    recipe = mae(tiny_image_config(), data__train=str(tmp_path / "images"))
    monkeypatch.setitem(pretraining.PRESETS, "small-teacher", Preset("small-teacher", "", "", "", recipe))
    with pytest.raises(ConfigError, match=r"small-teacher trains a different encoder .*width 48, not 64"):
        train(with_overrides(config, {"teacher.weights": None, "teacher.preset": "small-teacher"}))


def test_a_run_waits_for_a_teacher_that_another_process_is_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path)
    recipe = tiny_recipe(tmp_path)
    monkeypatch.setitem(pretraining.PRESETS, "tiny-teacher", Preset("tiny-teacher", "", "", "", recipe))
    config = with_overrides(config, {"teacher.weights": None, "teacher.preset": "tiny-teacher", "name": "student"})
    teacher = teacher_id("tiny-teacher", teacher_recipe(config))
    lease = Lease(join(run_folder(config.storage, teacher), "lease.json"))
    messages: list[str] = []

    class LeaseReleasingWatcher(NullWatcher):
        def log(self, text: str) -> None:
            if text.startswith("waiting"):
                messages.append(text)
                lease.release()  # as if the other process had exited

    monkeypatch.setattr(launch, "choose_watcher", lambda quiet: LeaseReleasingWatcher())
    assert lease.acquire()
    assert launch.train(config, local=True).state == "succeeded"
    assert messages == [f"waiting for {teacher}, which process {os.getpid()} on {socket.gethostname()} is training"]
