"""Tests for a training run, from list file to published encoder, in which one file in twenty is broken."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from service.cli import main
from tests.support.data.videos import pictures, write_audio_only, write_video
from tests.support.runs.configs import mae, tiny_video_config


def cut_after(path: Path, good: Path, fraction: float) -> None:
    content = good.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def write_video_with_leading_index(path: Path) -> Path:
    return write_video(path, pictures(12, 32, 24, seed=99), container={"movflags": "faststart"})


def write_image_as_mp4(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path, format="PNG")


DAMAGE_BY_NAME: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda path, good: cut_after(path, good, 0.5),
    "truncated after its index": lambda path, good: cut_after(path, write_video_with_leading_index(path), 0.7),
    "zero bytes": lambda path, good: path.write_bytes(b""),
    "random bytes": lambda path, good: path.write_bytes(random.Random(0).randbytes(20_000)),
    "text": lambda path, good: path.write_text("not a video\n" * 50),
    "audio only": lambda path, good: write_audio_only(path),
    "an image": lambda path, good: write_image_as_mp4(path),
    "missing": lambda path, good: None,
    "a folder": lambda path, good: path.mkdir(),
    "a read that stalls": lambda path, good: os.mkfifo(path),
}


@pytest.fixture(scope="module")
def damaged_data_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Write a list of 200 clips (20 files, each listed ten times) and ten broken ones; return the broken paths."""
    folder = tmp_path_factory.mktemp("damaged")
    good = [write_video(folder / f"good {n}.mp4", pictures(12, 32, 24, seed=n)) for n in range(20)]
    broken = [folder / f"broken {name}.mp4" for name in DAMAGE_BY_NAME]
    for path, damage in zip(broken, DAMAGE_BY_NAME.values(), strict=True):
        damage(path, good[0])
    lines = [f"{path.name} {n % 5}" for n, path in enumerate(good * 10 + broken)]
    random.Random(1).shuffle(lines)
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder, broken


def amd_train(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *args: str, limit: float
) -> tuple[int, Path]:
    config = mae(
        tiny_video_config(
            data__train=str(folder / "list.csv"),
            data__loader_workers=1,
            data__read_timeout_s=5.0,
            data__max_bad_fraction=limit,
            data__damage="strict",  # test_real_files.py covers files that are used as far as they decode
            optim__batch_size=7,
            schedule__steps=30,  # one epoch: 210 samples
            tracking__log_every_steps=5,
        ),
        storage=str(tmp_path / "storage"),
        name="run",
    )
    (tmp_path / "run.json").write_text(config.model_dump_json())
    monkeypatch.setattr(sys, "argv", ["amd", "train", "--config", str(tmp_path / "run.json"), "--local", *args])
    with pytest.raises(SystemExit) as end:
        main.main()
    return int(end.value.code or 0), tmp_path / "storage" / "runs" / "run"


def reported_paths(run: Path) -> set[str]:
    return {json.loads(line)["location"] for line in (run / "bad_samples.jsonl").read_text().splitlines()}


def test_broken_files_of_every_kind_are_reported_and_the_run_succeeds(
    damaged_data_set: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, broken = damaged_data_set
    code, run = amd_train(folder, tmp_path, monkeypatch, "--json", limit=0.06)
    assert code == 0
    assert reported_paths(run) == {str(path) for path in broken}
    last = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (last["state"], last["figures"]["data/bad_samples"]) == ("succeeded", len(broken))
    assert (Path(last["encoder_folder"]) / "encoder.safetensors").exists()


def test_a_run_with_too_many_broken_files_stops_and_lists_them(
    damaged_data_set: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, broken = damaged_data_set
    code, run = amd_train(folder, tmp_path, monkeypatch, limit=0.01)
    assert code == 1
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert "data.max_bad_fraction" in printed
    found = reported_paths(run)
    assert found <= {str(path) for path in broken}
    assert len(found) >= 3  # 1 % of 210 samples allows 2
    assert all(path in printed for path in found)
