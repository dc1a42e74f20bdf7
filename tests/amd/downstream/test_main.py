"""Tests for `python -m amd.downstream`, the entry point for `ray job submit`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amd.downstream.__main__ import main
from tests.amd.downstream.embedding.test_features import write_images
from tests.amd.downstream.probing.test_run import publish
from tests.support.runs.configs import tiny_image_config


def test_probe_prints_one_line_of_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path, tiny_image_config())
    write_images(tmp_path / "images", 12)
    data = {"train": str(tmp_path / "images"), "test": str(tmp_path / "images"), "loader_workers": 0}
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"encoder": "tiny", "data": data, "storage": str(tmp_path)}))
    assert main(["probe", "--config", str(file), "kinds=[knn]", "knn.neighbours=1"]) == 0
    assert json.loads(capfd.readouterr().out)["scores"][0]["values"]["eval/knn_top1"] == 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "unknown command ''; use one of "),
        (["prob"], "unknown command 'prob'; use one of "),
        (["probe", "data.train=x"], "encoder: required"),
        (["probe", "--config", "/nowhere"], "--config /nowhere: cannot be read"),
    ],
)
def test_invalid_input_exits_with_code_2(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert message in capfd.readouterr().err
