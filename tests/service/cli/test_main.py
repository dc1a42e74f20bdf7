"""Tests for the output and exit codes of the `amd` command, run as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.service.command import amd

MISTAKES = {
    "--preset demo-image-amd mask.teacher_ratio=0.9": "mask.teacher_ratio=0.9 must not be above",
    "--preset demo-image-amd objective.layers.0.student=9": "objective.layers.0.student=9 is out of range",
    "--preset demo-image-amd clip.size=33": "clip.size",
    "--preset demo-image-amd optim.batchsize=3": "did you mean optim.batch_size?",
    "--preset demo-image-amd name=../../x": "name='../../x'",
    "--preset demo-image-amd data.train=nowhere": "nowhere",
    "--preset demo-image-amd teacher.weights=nowhere.pth": "nowhere.pth",
    "--preset demo-image-mae storage=/proc/nowhere": "/proc/nowhere",
    "--preset demo-image-mae optim.batch_size=100000": "optim.batch_size=100000",
    "--preset demo-image-mae scaling.device=cuda": "scaling.device=cuda",
    "--preset k400-vit-b": "data.train",
    "--preset demo-imge-amd": "did you mean demo-image-amd?",
    "--config nowhere.json": "nowhere.json",
    "": "--preset NAME or --config FILE",
    "--preset demo-image-mae typo": "'typo' is not an override",
}


@pytest.mark.parametrize("args", MISTAKES)
def test_bad_input_prints_one_message_and_exits_with_code_2(
    args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMD_STORAGE", str(tmp_path / "storage"))
    code, out, err = amd(monkeypatch, capfd, "train", *args.split(), "--local", "--json")
    assert code == 2
    assert MISTAKES[args] in err
    assert "Traceback" not in err + out
    last = json.loads(out.strip().splitlines()[-1])
    assert last["state"] == "invalid"
    assert MISTAKES[args] in " ".join(last["problems"])


def test_an_empty_folder_is_rejected_as_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = amd(
        monkeypatch, capfd, "train", "--preset", "demo-image-mae", f"data.train={tmp_path / 'empty'}", "--local"
    )
    assert code == 2
    assert str(tmp_path / "empty") in err
    assert "specify the folder that contains them" in err
    assert "Traceback" not in err


def test_presets_are_listed_with_source_hardware_and_cost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = amd(monkeypatch, capfd, "presets", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert {"k400-vit-b", "ssv2-vit-s", "in1k-vit-b", "demo-video-amd"} <= set(rows)
    kinds = {name: row["kind"] for name, row in rows.items()}
    assert (kinds["k400-vit-b-finetune"], kinds["ava-vit-b"]) == ("finetune", "detect")
    assert all(row["source"] and row["hardware"] for row in rows.values())
    for kind in ("train", "finetune"):  # the presets that any machine can run are listed first
        demo = [name.startswith("demo-") for name in rows if kinds[name] == kind]
        assert any(demo)
        assert demo == sorted(demo, reverse=True)


def test_a_printed_preset_can_be_loaded_as_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from amd.config import TrainConfig
    from amd.presets.load import find_preset, load_config

    _, out, _ = amd(monkeypatch, capfd, "presets", "demo-video-amd")
    file = tmp_path / "run.json"
    file.write_text(out)
    assert load_config(TrainConfig, None, str(file), {}) == find_preset(TrainConfig, "demo-video-amd").config


def test_parity_fails_and_reports_a_changed_value(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(golden, tmp_path / "golden")
    code, out, _ = amd(monkeypatch, capfd, "parity", str(folder))
    assert code == 0
    assert "0 failed" in out
    outputs = load_file(folder / "amd_outputs_f32.safetensors")
    outputs["teacher_dir.1"][0, 0, 0] += 1e-3
    save_file(outputs, folder / "amd_outputs_f32.safetensors")
    code, out, _ = amd(monkeypatch, capfd, "parity", str(folder))
    assert code == 1
    assert "teacher_dir.1" in out


def test_bench_step_reports_the_share_of_time_spent_in_each_part(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("bench", "step", "--preset", "demo-video-amd", "--batch", "2", "--steps", "2", "--json")
    code, out, _ = amd(monkeypatch, capfd, *args)
    figures = json.loads(out)
    assert code == 0
    assert sum(figures["share"].values()) == pytest.approx(1)
    assert set(figures["share"]) == {"data", "teacher", "student_forward", "backward", "optimizer"}
    assert figures["samples_per_s"] > 0
    assert figures["matmul_fraction"] > 0


def test_presets_are_printed_as_yaml(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    _, listed, _ = amd(monkeypatch, capfd, "presets", "--json")
    _, out, _ = amd(monkeypatch, capfd, "presets", "-o", "yaml")
    assert yaml.safe_load(out) == json.loads(listed)
    _, config, _ = amd(monkeypatch, capfd, "presets", "demo-video-amd")
    _, out, _ = amd(monkeypatch, capfd, "presets", "demo-video-amd", "-o", "yaml")
    assert yaml.safe_load(out) == json.loads(config)


def test_presets_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['amd', 'presets', '--json']\n"
        "from service.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
