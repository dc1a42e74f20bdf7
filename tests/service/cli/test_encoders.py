"""Tests for listing, showing, importing and exporting encoders with `amd encoders`, without a service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amd.artifacts.card import Score
from amd.artifacts.weights import load_card, write_card
from service.cli.encoders import ENCODERS
from service.cli.main import main


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["amd", "encoders", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run `amd encoders …` with a temporary storage root; returns (exit code, standard output, standard error)."""
    monkeypatch.setenv("AMD_STORAGE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: run(monkeypatch, capsys, *args)


def test_weights_are_imported_listed_shown_and_exported(amd: Any, golden: Path, tmp_path: Path) -> None:
    code, out, _ = amd("list")
    assert (code, "No encoders" in out) == (0, True)
    options = ("--id", "mine", "--heads", 3, "--license", "CC-BY-NC-4.0")
    code, out, _ = amd("import", golden / "mae_state.safetensors", *options)
    assert (code, "non-commercial use only" in out) == (0, True)

    code, out, _ = amd("list")
    assert code == 0
    assert all(text in out for text in ("mine", "NC CC-BY-NC-4.0", "16x16", "imported", "NC: non-commercial"))
    code, out, _ = amd("show", "mine")
    assert code == 0
    assert "Non-commercial use only" in out
    assert "license:" not in out

    output = tmp_path / "out"
    code, out, _ = amd("export", "mine", "--format", "huggingface", "--output", output)
    assert (code, "differs from the published encoder by at most" in out) == (0, True)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "export.json", "README.md"} == {
        path.name for path in output.iterdir()
    }


def test_a_licence_that_is_not_stated_is_listed_as_such() -> None:
    (licence,) = [column for column in ENCODERS.columns if column.title == "licence"]
    for stated, text in ((None, "not stated"), ("Apache-2.0", "Apache-2.0")):
        assert str(licence.cell({"non_commercial": False, "weights_license": stated})) == text


@pytest.mark.slow
def test_every_command_prints_only_json_on_standard_output(amd: Any, golden: Path, tmp_path: Path) -> None:
    args = ("--id", "mine", "--heads", 3, "--image-size", "16x16", "--mean", "0.5,0.4,0.3")
    imported = json.loads(amd("import", golden / "mae_state.safetensors", *args, "--json")[1])
    assert imported["id"] == "mine"
    assert imported["url"].endswith("encoders/mine")
    card = load_card(imported["url"])
    assert card.clip.mean == (0.5, 0.4, 0.3)
    score = Score(protocol="knn", data="d", samples=3, values={"eval/knn_top1": 61.5})
    write_card(imported["url"], card.model_copy(update={"scores": (score,)}))
    (row,) = json.loads(amd("list", "--json")[1])
    assert (row["best_score"], row["non_commercial"], row["clip"]) == ({"eval/knn_top1": 61.5}, False, "16x16")
    assert json.loads(amd("show", "mine", "--json")[1])["encoder"]["width"] == 24
    for format, name in (("timm", "t"), ("torch-export", "e.pt2"), ("onnx", "o.onnx"), ("official", "o.pth")):
        code, out, _ = amd("export", "mine", "-f", format, "-o", tmp_path / name, "--json")
        report = json.loads(out)
        assert (code, report["format"]) == (0, format)
        assert report["deviation"] < 1e-5
        assert (tmp_path / name).exists()


def test_a_broken_card_is_reported_and_the_other_encoders_are_listed(amd: Any, golden: Path, tmp_path: Path) -> None:
    amd("import", golden / "mae_state.safetensors", "--id", "mine", "--heads", 3)
    (tmp_path / "encoders" / "broken").mkdir()
    (tmp_path / "encoders" / "broken" / "encoder.json").write_text("{")
    code, out, error = amd("list", "--json")
    assert (code, [row["id"] for row in json.loads(out)]) == (0, ["mine"])
    assert "broken" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show", "nothing"), "not a published encoder"),
        (("import", "nowhere.pth"), "no such file"),
        (("import", "x.pth", "--size", "XL"), "--size XL: must be one of S, B, L, H"),
        (("import", "x.pth", "--image-size", "2x2x2"), "--image-size 2x2x2"),
        (("import", "x.pth", "--std", "1,2"), "--std 1,2: must be three comma-separated numbers"),
        (("export", "nothing", "-f", "gguf", "-o", "x"), "--format gguf: must be one of timm"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_code_2(amd: Any, args: tuple[str, ...], message: str) -> None:
    code, _, error = amd(*args)
    assert code == 2
    assert message in " ".join(error.split())
    assert "Traceback" not in error


def test_help_does_not_import_torch() -> None:
    code = "import sys, service.cli.encoders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
