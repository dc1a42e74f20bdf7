"""Tests for `amd embed` with single files and whole data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.amd.downstream.embedding.test_bulk import assert_each_record_once
from tests.amd.downstream.embedding.test_features import write_images
from tests.support.encoders.published_encoders import publish
from tests.support.service.command import amd


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMD_STORAGE", str(tmp_path))
    publish(tmp_path / "encoders" / "small")
    write_images(tmp_path / "images", 6)
    return tmp_path


def test_embedding_a_data_set_writes_files_and_embedding_a_file_prints_a_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ["embed", "--encoder", "sma", f"data.train={root / 'images'}", "data.loader_workers=0", "--local"]
    code, out, err = amd(monkeypatch, capfd, *args, "--json", "--output", str(root / "out"))
    assert code == 0, err
    assert json.loads(out)["samples"] == 6
    assert_each_record_once(str(root / "out"))
    code, out, _ = amd(monkeypatch, capfd, *args)
    assert code == 0
    assert "6 samples" in out
    assert str(root / "embeddings" / "small") in out
    code, out, _ = amd(monkeypatch, capfd, "embed", "-e", "sm", str(root / "images" / "a" / "000.png"), "--json")
    assert code == 0
    printed = json.loads(out)
    assert (printed["encoder"], len(printed["embedding"])) == ("small", 24)


MISTAKES = {
    "-e small": "data: required",
    "cat.png": "--encoder: required",
    "-e small cat.png data.train=x": "cat.png: pass files or a data set",
    "-e small cat.png --output x": "--submit, --output: apply only to a data set",
    "-e nowhere data.train=x": "nowhere: not a published encoder",
    "-e small data.tran=x": "did you mean data.train?",
    "-e small data.train=nowhere --local": "nowhere does not exist",
}


def test_an_ambiguous_encoder_id_is_rejected_with_the_candidates(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (root / "encoders" / "smaller").mkdir()
    for args in (["cat.png"], ["data.train=x"]):
        code, _, err = amd(monkeypatch, capfd, "embed", "-e", "sma", *args)
        assert (code, "'sma' matches 2 encoders: small, smaller" in err) == (2, True)


@pytest.mark.parametrize("args", MISTAKES)
def test_bad_input_prints_a_message_and_exits_with_code_2(
    args: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = amd(monkeypatch, capfd, "embed", *args.split())
    assert code == 2, err
    assert MISTAKES[args] in err
