"""`python -m amd.tasks`, as a job runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amd.artifacts.weights import load_card
from amd.tasks import main
from tests.amd.downstream.embedding.test_features import write_images


@pytest.fixture
def done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """What a task prints at its end, its config in a file as a job's is."""

    def run(command: str, *words: str, **config: Any) -> dict[str, Any]:
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"storage": str(tmp_path), **config}))
        assert main([command, "--config", str(file), *words]) == 0
        last: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
        return last

    return run


def test_weights_come_in_and_leave_in_another_format(done: Any, golden: Path, tmp_path: Path) -> None:
    weights = str(golden / "mae_state.safetensors")
    imported = done("import", "heads=3", weights=weights, license="CC-BY-NC-4.0")
    assert imported["encoder_folder"] == str(tmp_path / "encoders" / "mae_state")
    assert load_card(imported["encoder_folder"]).weights_license == "CC-BY-NC-4.0"
    exported = done("export", encoder="mae_state", format="official", output=str(tmp_path / "out"))
    assert Path(exported["output"]) == tmp_path / "out" / "mae_state.pth"
    assert Path(exported["output"]).exists()


def test_a_preparation_goes_on_where_it_was(done: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    words: dict[str, Any] = {"data": {"train": str(tmp_path / "images")}, "output": str(tmp_path / "shards")}
    assert done("prepare", short_side=16, **words)["samples"] == 6
    assert done("prepare", short_side=16, **words)["shards_kept"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import"], "weights: required"),
        (["import", "weights=a.pth", "id=../b"], "id=../b: letters, digits"),
        (["import", "weights=a.pth", "size=XXL"], "size=XXL is not one of"),
        (["export", "encoder=mine"], "output: required"),
        (["import", "--config", "/nowhere"], "--config /nowhere: cannot be read"),
    ],
)
def test_a_mistake_is_bad_input(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capfd.readouterr().err
