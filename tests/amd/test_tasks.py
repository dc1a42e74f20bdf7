"""Tests for `python -m amd.tasks`, which jobs run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amd.artifacts.weights import load_card
from amd.tasks import main
from tests.amd.downstream.embedding.test_features import write_images


@pytest.fixture
def run_task(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a task with its config in a file, as a job does, and return its result."""

    def run(command: str, *args: str, **config: Any) -> dict[str, Any]:
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"storage": str(tmp_path), **config}))
        assert main([command, "--config", str(file), *args]) == 0
        last: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
        return last

    return run


def test_weights_are_imported_and_exported(run_task: Any, golden: Path, tmp_path: Path) -> None:
    weights = str(golden / "mae_state.safetensors")
    imported = run_task("import", "heads=3", weights=weights, license="CC-BY-NC-4.0")
    assert imported["encoder_folder"] == str(tmp_path / "encoders" / "mae_state")
    assert load_card(imported["encoder_folder"]).weights_license == "CC-BY-NC-4.0"
    exported = run_task("export", encoder="mae_state", format="official", output=str(tmp_path / "out"))
    assert Path(exported["output"]) == tmp_path / "out" / "mae_state.pth"
    assert Path(exported["output"]).exists()


def test_preparation_resumes_from_finished_shards(run_task: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    args: dict[str, Any] = {"data": {"train": str(tmp_path / "images")}, "output": str(tmp_path / "shards")}
    assert run_task("prepare", short_side=16, **args)["samples"] == 6
    assert run_task("prepare", short_side=16, **args)["shards_kept"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["import"], "weights: required"),
        (["import", "weights=a.pth", "id=../b"], "id=../b must consist of letters, digits"),
        (["import", "weights=a.pth", "size=XXL"], "size=XXL is not one of"),
        (["export", "encoder=mine"], "output: required"),
        (["import", "--config", "/nowhere"], "--config /nowhere: cannot be read"),
    ],
)
def test_invalid_input_exits_with_code_2(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert message in capfd.readouterr().err
