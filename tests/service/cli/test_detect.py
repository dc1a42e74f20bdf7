"""Tests that `amd detect` exits with code 2 and an error message on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.data.ava_videos import draw, tiny_detection
from tests.support.service.command import amd


def test_bad_input_is_reported_as_json_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "detect.json"
    config.write_text(tiny_detection(draw(tmp_path, videos=3)).model_dump_json())
    line = (tmp_path / "train.csv").read_text().splitlines()[0]
    (tmp_path / "train.csv").write_text(line.replace("v0,0001,", "v0,0001,-") + "\n")
    code, out, err = amd(monkeypatch, capfd, "detect", "--config", str(config), "--local", "--json")
    assert code == 2
    assert "train.csv:1: box -" in err
    assert "extends outside the frame" in json.loads(out)["problems"][0]
    code, _, err = amd(monkeypatch, capfd, "detect", "--preset", "ava")
    assert code == 2
    assert "preset='ava': unknown; " in err
