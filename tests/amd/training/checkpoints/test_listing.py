from __future__ import annotations

from pathlib import Path

from amd.training.checkpoints.listing import committed_steps, newest_step


def test_only_checkpoints_with_a_manifest_are_committed(tmp_path: Path) -> None:
    assert newest_step(str(tmp_path)) == 0
    for step, files in {4: ["manifest.json"], 12: ["manifest.json"], 16: ["model.safetensors"]}.items():
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).touch()
    (tmp_path / "checkpoints" / "other").mkdir()
    assert committed_steps(str(tmp_path / "checkpoints")) == [4, 12]
    assert newest_step(str(tmp_path)) == 12
