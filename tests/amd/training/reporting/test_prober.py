"""Probes run at the configured epochs in a separate process, and neither delay nor fail the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amd.config import RunProbeConfig, validate
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.reporting.prober import Prober, is_probed, probed_steps
from amd.training.reporting.progress import NullWatcher
from amd.training.runs import launch
from tests.support.runs.tiny_runs import tiny_images, tiny_run


class MessageRecorder(NullWatcher):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, text: str) -> None:
        self.messages.append(text)


def probed_run(folder: Path, **probe: Any) -> Any:
    data = {
        "train": str(tiny_images(folder / "train")),
        "test": str(tiny_images(folder / "test", 10)),
        "loader_workers": 0,
    }
    return tiny_run(folder, name="probed", probe={"data": data, "every_epochs": 2, **probe})


def test_a_run_is_probed_in_a_separate_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = MessageRecorder()
    monkeypatch.setattr(launch, "choose_watcher", lambda quiet: recorder)
    result = launch.train(probed_run(tmp_path, every_epochs=4), local=True)  # 3 steps per epoch, 12 steps
    assert result.state == "succeeded", result.message
    lines = {line["step"]: line for line in read_metrics(result.run_folder) if "eval/knn_top1" in line}
    assert sorted(lines) == [12]
    assert all(0 <= line["eval/top1"] <= 100 for line in lines.values())
    assert sum(text.startswith("probe of step") for text in recorder.messages) == 1


def test_a_failed_probe_is_reported_and_the_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = MessageRecorder()
    monkeypatch.setattr(launch, "choose_watcher", lambda quiet: recorder)
    config = probed_run(tmp_path, every_epochs=4)
    for path in (tmp_path / "test").rglob("*.png"):
        path.unlink()
    result = launch.train(config, local=True)
    assert result.state == "succeeded"
    assert [text for text in recorder.messages if text.startswith("WARNING the probe of step 12 failed: error: ")]


@pytest.mark.parametrize(("step", "probed"), [(9, False), (10, True), (15, False), (20, True), (23, True)])
def test_probes_run_every_n_epochs_and_at_the_end_of_the_run(step: int, probed: bool) -> None:
    assert is_probed(step, steps=23, steps_per_epoch=5, every_epochs=2) is probed
    assert (step in probed_steps(23, 5, 2)) is probed


def test_a_checkpoint_removed_before_it_is_probed_is_skipped_with_a_warning(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="short", checkpoint__keep_last=1)
    result = launch.train(config, local=True, quiet=True)
    recorder = MessageRecorder()
    data = {"train": str(tmp_path / "images"), "test": str(tmp_path / "images")}
    prober = Prober(recorder, result.run_folder, validate(RunProbeConfig, {"data": data, "every_epochs": 1}))
    prober.on_event({"kind": "start", "steps": 12, "epochs": 4})
    prober.on_event({"kind": "checkpoint", "step": 3})
    prober.close()
    assert recorder.messages == [
        "WARNING step 3 was not probed: its checkpoint was removed; raise checkpoint.keep_last"
    ]
