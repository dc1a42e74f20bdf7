"""Tests for `amd probe`: its output, its config, and one message with exit code 2 on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amd.artifacts.weights import load_card
from tests.amd.downstream.embedding.test_features import write_images
from tests.amd.downstream.probing.test_run import publish
from tests.support.runs.configs import tiny_image_config
from tests.support.service.command import amd


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("AMD_STORAGE", str(tmp_path))
    publish(tmp_path, tiny_image_config())
    write_images(tmp_path / "gallery", 20)
    write_images(tmp_path / "query", 10, seed=1)
    data = [f"data.train={tmp_path / 'gallery'}", f"data.test={tmp_path / 'query'}", "data.loader_workers=0"]
    return ["probe", "--encoder", "tiny", *data, "scaling.device=cpu"]


def test_scores_are_printed_as_a_table_or_one_line_of_json(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["few_shot.labels=[1,2]", "few_shot.draws=2", "linear.method=logistic"]
    code, out, _ = amd(monkeypatch, capfd, *args, *few, "--kinds", "knn,linear,few-shot")
    assert code == 0
    assert "knn_top1" in out
    assert "100.00" in out
    assert "±" in out
    code, out, err = amd(monkeypatch, capfd, *args, "--kinds", "knn", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["scores"][0]["values"]["eval/knn_top1"] == 100
    assert "features of data.train" in err
    card = load_card(str(tmp_path / "encoders" / "tiny"))
    assert sorted(score.protocol for score in card.scores) == ["few_shot", "knn", "linear"]


def test_a_config_file_and_overrides_are_equivalent(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"train": str(tmp_path / "gallery"), "test": str(tmp_path / "nowhere"), "loader_workers": 0}
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"encoder": "ti", "kinds": ["knn"], "data": data}))
    code, out, _ = amd(monkeypatch, capfd, "probe", "--config", str(file), f"data.test={tmp_path / 'query'}", "--json")
    assert code == 0
    assert json.loads(out)["scores"][0]["data"] == str(tmp_path / "query")


MISTAKES = {
    "--encoder nowhere": "nowhere: not a published encoder",
    "--kinds nearest": "kinds.0='nearest'",
    "data=x": "set data.train=… and data.test=…",
    "data.tset=x": "did you mean data.test?",
    "linear.method=logistic linear.augment=image": "linear.augment=image",
    "few_shot.labels=[1,11] --kinds few-shot": "few_shot.labels=[1, 11]",
    "classes=20 data.test=/nowhere": "data.test: /nowhere does not exist",
    "pooling=class_token data.train=demo:nothing": "demo:nothing/train does not exist",
    "scaling.device=cuda": "scaling.device=cuda",
    "--config /nowhere.json": "/nowhere.json: cannot be read",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_prints_one_message_and_exits_with_code_2(
    mistake: str, args: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = amd(monkeypatch, capfd, *args, *mistake.split(), "--json")
    assert code == 2
    assert MISTAKES[mistake] in err
    assert "Traceback" not in err + out
    assert MISTAKES[mistake] in " ".join(json.loads(out.strip().splitlines()[-1])["problems"])


def test_too_many_unreadable_samples_cause_an_error_that_lists_their_paths(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "query" / "a" / "000.png").write_bytes(b"not a picture")
    code, _, err = amd(monkeypatch, capfd, *args)
    assert code == 1
    assert "000.png" in err
    assert "Traceback" not in err
    assert load_card(str(tmp_path / "encoders" / "tiny")).scores == ()
