"""Tests for bench/__main__.py and bench/commands.py: `python -m amd.bench`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amd.bench import commands
from amd.bench import data as bench_data
from amd.bench import step as bench_step
from amd.bench.__main__ import main
from amd.config import DataConfig


def test_step_prints_metrics_as_json_or_as_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def measure(config: Any, **options: Any) -> dict[str, Any]:
        calls.append((config.mask.teacher_ratio, config.scaling.device, options))
        return {"samples_per_s": 3.5}

    monkeypatch.setattr(bench_step, "bench_step", measure)
    arguments = ["step", "--preset", "demo-video-amd", "--batch", "2", "mask.teacher_ratio=0.6"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"preset": "demo-video-amd", "samples_per_s": 3.5}
    assert main(arguments) == 0
    printed = "One training step\npreset         demo-video-amd\nsamples_per_s             3.5\n"
    assert capsys.readouterr().out == printed
    assert calls == [(0.6, "auto", {"batch": 2, "steps": commands.STEPS})] * 2


@pytest.mark.parametrize(
    ("command", "defaults"),
    [("step", [commands.STEP_PRESET, commands.BATCH, commands.STEPS]), ("data", [commands.SAMPLES])],
)
def test_the_help_states_the_defaults(command: str, defaults: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for default in defaults:
        assert f"Default: {default}." in printed


def test_data_measures_the_given_data_or_synthetic_videos(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(bench_data, "bench_data", lambda *args, **options: calls.append((args, options)) or {})
    assert main(["data", "--json"]) == main(["data", "--json", "--samples", "3", "data=/x", "data.crop=center"]) == 0
    assert main(["data", "--json", "--preset", "k400-vit-b", "--target", "9"]) == 0
    (synthetic, defaults), (given, options), (preset, targeted) = calls
    assert synthetic == (None, None)
    assert (defaults["samples"], defaults["target"]) == (commands.SAMPLES, None)
    assert given == (DataConfig(train="/x", crop="center"), None)
    assert options["samples"] == 3
    assert preset[0] is None  # the preset leaves data.train to the user
    assert (preset[1].frames, targeted["target"]) == (16, 9.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "mask.teacher_ratio=2"], "mask.teacher_ratio=2"),
        (["step", "--preset", "no-such-preset"], "no-such-preset"),
        (["data", "mask.teacher_ratio=0.6"], "mask.teacher_ratio: only data.… keys are accepted"),
    ],
)
def test_invalid_input_exits_with_code_2_and_reports_the_field(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_command_exits_with_code_2_and_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["model"]) == 2
    assert "unknown command 'model'; use one of step, data" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["step", "--batch", "0"], ["data", "--samples", "many"]])
def test_an_invalid_command_line_exits_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage: python -m amd.bench" in capsys.readouterr().err
