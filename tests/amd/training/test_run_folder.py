from __future__ import annotations

from pathlib import Path

import pytest

from amd.config import TrainConfig
from amd.training.run_folder import RunResult, spec_of
from tests.support.runs.configs import mae, tiny_image_config


def test_workers_receive_absolute_paths_and_unchanged_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").touch()
    config = tiny_image_config(data__train="images", data__cache_dir="cache", teacher__weights="weights.safetensors")
    received = spec_of("one", "/root", config, "digest").parsed(TrainConfig)
    assert received.data.train == str(tmp_path / "images")
    assert received.data.cache_dir == str(tmp_path / "cache")
    assert received.teacher is not None
    assert received.teacher.weights == str(tmp_path / "weights.safetensors")
    assert received.storage == "/root"
    for train in ("s3://bucket/images", "demo:digits"):
        assert spec_of("one", "/root", mae(config, data__train=train), "").parsed(TrainConfig).data.train == train
    remote = tiny_image_config(teacher__weights="timm:vit_base_patch16_224.mae").model_copy()
    assert spec_of("one", "/root", remote, "").config["teacher"]["weights"] == "timm:vit_base_patch16_224.mae"


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
def test_only_a_successful_run_has_exit_code_0(state: str, code: int) -> None:
    assert RunResult(state=state, run_id="one", run_folder="runs/one").exit_code == code
