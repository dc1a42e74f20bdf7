from __future__ import annotations

from pathlib import Path

import pytest

from amd.config import TrainConfig
from amd.training.run_folder import RunResult, spec_of
from tests.support.runs.configs import mae, tiny_image_config


def test_workers_are_told_absolute_paths_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").touch()
    config = tiny_image_config(data__train="images", data__cache_dir="cache", teacher__weights="weights.safetensors")
    told = spec_of("one", "/root", config, "digest").parsed(TrainConfig)
    assert told.data.train == str(tmp_path / "images")
    assert told.data.cache_dir == str(tmp_path / "cache")
    assert told.teacher is not None
    assert told.teacher.weights == str(tmp_path / "weights.safetensors")
    assert told.storage == "/root"
    for train in ("s3://bucket/images", "demo:digits"):
        assert spec_of("one", "/root", mae(config, data__train=train), "").parsed(TrainConfig).data.train == train
    remote = tiny_image_config(teacher__weights="timm:vit_base_patch16_224.mae").model_copy()
    assert spec_of("one", "/root", remote, "").config["teacher"]["weights"] == "timm:vit_base_patch16_224.mae"


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
def test_the_exit_code_follows_from_the_state(state: str, code: int) -> None:
    assert RunResult(state=state, run_id="one", run_folder="runs/one").exit_code == code
