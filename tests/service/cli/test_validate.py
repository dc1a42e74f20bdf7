"""Tests for `amd validate`: how much is decoded, its exit code, and messages for mistakes in its arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.service.command import amd


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 20 images, of which the last is broken."""
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "19.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def test_more_unreadable_images_than_training_accepts_exit_with_code_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = amd(monkeypatch, capfd, "validate", f"data={folder}", "--json")
    assert code == 2
    assert "1 of 20 decoded samples cannot be read, more than data.max_bad_fraction=0.01 allows: fix them" in err
    assert f"{folder}/19.png" in err
    assert json.loads(out)["state"] == "invalid"
    code, out, _ = amd(monkeypatch, capfd, "validate", f"data={folder}", "data.max_bad_fraction=0.05")
    assert code == 0
    assert "samples decoded: 20 of 20" in out
    assert f"cannot be read, skipped in training: 1 of 20\n  {folder}/19.png" in out


def test_all_decodes_every_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("amd.data.validation.DECODED_IMAGES", 5)
    args = ("validate", f"data={folder}", "data.max_bad_fraction=0.5", "--json")
    assert json.loads(amd(monkeypatch, capfd, *args)[1])["read"] == 5
    assert json.loads(amd(monkeypatch, capfd, *args, "--all")[1])["read"] == 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "data: required, but not set; use data=<folder, list file or tar shards>"),
        (["/data/images"], "'/data/images' is not an override: use key=value, for example data=FOLDER"),
        (
            ["--preset", "demo-image-amd", "data.train=/data/images", 'teacher.overrides={"schedule.steps": 50}'],
            "teacher.overrides.schedule",
        ),
        (["--preset", "demo-image-mae", "data=/data/images"], "is a section; did you mean data.train=/data/images?"),
    ],
)
def test_a_mistake_in_the_arguments_names_the_key_to_use(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = amd(monkeypatch, capfd, "validate", *args)
    assert code == 2
    assert message in err
