"""Tests that `amd finetune` prints one message and exits with code 2 on bad input."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.runs.finetuning import shaded_clips, shaded_images, tiny_finetuning
from tests.support.service.command import amd


def one_class(folder: Path) -> list[str]:
    shaded_images(folder / "single", 4, names=("dark", "dark"))
    return [f"data.train={folder / 'single'}", "data.val=null", "optim.batch_size=2"]


def no_validation(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return [f"data.val={folder / 'empty'}"]


def labels_out_of_range(folder: Path) -> list[str]:
    (folder / "val.txt").write_text("val/dark/000.png 0\nval/bright/001.png 7\n")
    return [f"data.val={folder / 'val.txt'}"]


def labels_missing(folder: Path) -> list[str]:
    names = sorted((folder / "train" / "dark").iterdir())
    (folder / "bare.txt").write_text("".join(f"{name} {-1 if i else 0}\n" for i, name in enumerate(names)))
    return [f"data.train={folder / 'bare.txt'}"]


def too_many_classes(folder: Path) -> list[str]:
    return ["head.classes=5"]


def unknown_folder(folder: Path) -> list[str]:
    return [f"data.val={shaded_images(folder / 'other', 4, names=('dark', 'grey'))}"]


def short_videos(folder: Path) -> list[str]:
    videos = shaded_clips(folder / "videos", 8, frames=4)
    return [f"data.train={videos}", "data.val=null", "clip.frames=8", "clip.tubelet=2"]


def no_weights(folder: Path) -> list[str]:
    return ["weights=nowhere.safetensors"]


def other_architecture(folder: Path) -> list[str]:
    from safetensors.torch import save_file

    from amd.config import EncoderConfig, TokenGrid
    from amd.models.encoder import Encoder

    wide = Encoder(EncoderConfig(width=48, depth=2, heads=3), TokenGrid(1, 4, 4), 48)
    save_file(wide.state_dict(), folder / "wide.safetensors")
    return [f"weights={folder / 'wide.safetensors'}"]


class MaliciousPickle:
    """An object that prints when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def malicious(folder: Path) -> list[str]:
    (folder / "malicious.pth").write_bytes(pickle.dumps({"model": MaliciousPickle()}))
    return [f"weights={folder / 'malicious.pth'}"]


def truncated(folder: Path) -> list[str]:
    torch.save({"model": {"head.weight": torch.zeros(1000)}}, folder / "cut.pth")
    (folder / "cut.pth").write_bytes((folder / "cut.pth").read_bytes()[:500])
    return [f"weights={folder / 'cut.pth'}"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (one_class, "at least two classes"),
        (no_validation, "data.val"),
        (labels_out_of_range, "out of range (first: 7"),
        (labels_missing, "have no label"),
        (too_many_classes, "3 of 5 classes have no sample"),
        (unknown_folder, "class folders grey do not exist in data.train"),
        (short_videos, "fewer than clip.frames=8"),
        (no_weights, "nowhere.safetensors"),
        (other_architecture, "wide.safetensors"),
        (malicious, "malicious.pth"),
        (truncated, "cut.pth"),
    ],
)
def test_bad_input_prints_one_message_and_exits_with_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mistake: Callable[[Path], list[str]],
    message: str,
) -> None:
    config = tmp_path / "finetune.json"
    values = tiny_finetuning(tmp_path).model_copy(
        update={"head": tiny_finetuning(tmp_path).head.model_copy(update={"classes": None})}
    )
    config.write_text(values.model_dump_json())
    code, out, err = amd(monkeypatch, capfd, "finetune", "--config", str(config), "--local", *mistake(tmp_path))
    assert code == 2, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert "must never run" not in out + err
