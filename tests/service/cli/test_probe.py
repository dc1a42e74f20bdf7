from __future__ import annotations

import json
from pathlib import Path

import pytest

from amd.artifacts.weights import load_card
from tests.amd.downstream.embedding.test_features import write_images
from tests.amd.downstream.probing.test_run import publish
from tests.service.cli.test_main import amd
from tests.support.runs.configs import tiny_image_config


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("AMD_STORAGE", str(tmp_path))
    publish(tmp_path, tiny_image_config())
    write_images(tmp_path / "known", 20)
    write_images(tmp_path / "asked", 10, seed=1)
    data = [f"data.train={tmp_path / 'known'}", f"data.test={tmp_path / 'asked'}", "data.loader_workers=0"]
    return ["probe", "--encoder", "tiny", *data, "scaling.device=cpu"]


def test_figures_are_a_table_for_people_and_one_line_for_programs(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["few_shot.labels=[1,2]", "few_shot.draws=2", "linear.method=logistic"]
    code, out, _ = amd(monkeypatch, capfd, *words, *few, "--kinds", "knn,linear,few-shot")
    assert code == 0
    assert "knn_top1" in out
    assert "100.00" in out
    assert "±" in out
    code, out, err = amd(monkeypatch, capfd, *words, "--kinds", "knn", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["scores"][0]["values"]["eval/knn_top1"] == 100
    assert "features of data.train" in err
    card = load_card(str(tmp_path / "encoders" / "tiny"))
    assert sorted(score.protocol for score in card.scores) == ["few_shot", "knn", "linear"]


def test_a_config_file_and_overrides_say_the_same(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"train": str(tmp_path / "known"), "test": str(tmp_path / "nowhere"), "loader_workers": 0}
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"encoder": "tiny", "kinds": ["knn"], "data": data}))
    code, out, _ = amd(monkeypatch, capfd, "probe", "--config", str(file), f"data.test={tmp_path / 'asked'}", "--json")
    assert code == 0
    assert json.loads(out)["scores"][0]["data"] == str(tmp_path / "asked")


MISTAKES = {
    "--encoder nowhere": "nowhere: no encoder is published there",
    "--kinds nearest": "kinds.0='nearest'",
    "data=x": "give data.train=… and data.test=…",
    "data.tset=x": "did you mean test?",
    "linear.method=logistic linear.augment=image": "linear.augment=image",
    "few_shot.labels=[1,11] --kinds few-shot": "few_shot.labels=[1, 11]",
    "classes=20 data.test=/nowhere": "data.test: /nowhere does not exist",
    "pooling=class_token data.train=demo:nothing": "demo:nothing/train does not exist",
    "scaling.device=cuda": "scaling.device=cuda",
    "--config /nowhere.json": "/nowhere.json: cannot be read",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_mistake_ends_in_one_message_and_exit_code_2(
    mistake: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = amd(monkeypatch, capfd, *words, *mistake.split(), "--json")
    assert code == 2
    assert MISTAKES[mistake] in err
    assert "Traceback" not in err + out
    assert MISTAKES[mistake] in " ".join(json.loads(out.strip().splitlines()[-1])["problems"])


def test_too_many_unreadable_samples_fail_with_their_names(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked" / "a" / "000.png").write_bytes(b"not a picture")
    code, _, err = amd(monkeypatch, capfd, *words)
    assert code == 1
    assert "000.png" in err
    assert "Traceback" not in err
    assert load_card(str(tmp_path / "encoders" / "tiny")).scores == ()
