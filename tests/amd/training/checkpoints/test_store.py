from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
import torch

from amd.config import CheckpointConfig
from amd.storage import StorageUnreachable, join, listdir, remove, write_bytes
from amd.training.checkpoints.store import MANIFEST, CheckpointStore, DamagedCheckpoint, Snapshot
from amd.training.failures import UploadError


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"w:step": torch.tensor(step)}}, {"step": step}
    )


def store(root: str, steps: list[int], **policy: object) -> CheckpointStore:
    checkpoints = CheckpointStore(join(root, "checkpoints"), CheckpointConfig(**policy))
    for step in steps:
        checkpoints.save(step, snapshot(step), {"loss/total": abs(step - 20) / 10})
    checkpoints.wait()
    return checkpoints


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_root")


def test_the_newest_checkpoint_is_restored_and_old_ones_are_removed(root: str) -> None:
    checkpoints = store(root, [10, 20, 30], keep_last=2)
    assert checkpoints.committed() == [20, 30]
    step, loaded = checkpoints.load_newest()
    assert step == 30
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((3,), 30.0))
    assert loaded.tensors["optimizer"]["w:step"].item() == 30
    assert loaded.state == {"step": 30}


def test_a_checkpoint_is_written_only_after_its_before_callback_succeeds(root: str) -> None:
    checkpoints = CheckpointStore(join(root, "checkpoints"), CheckpointConfig())
    found: list[list[str]] = []
    checkpoints.save(10, snapshot(10), {}, before=lambda: found.append(listdir(checkpoints.folder)))
    assert checkpoints.wait()
    assert found == [[]], "called before the first file"

    def fail() -> None:
        raise StorageUnreachable("metrics: the store has not responded")

    checkpoints.save(20, snapshot(20), {}, before=fail)
    with pytest.raises(UploadError, match="metrics: the store has not responded"):
        checkpoints.wait()
    assert checkpoints.committed() == [10]


def test_a_damaged_checkpoint_is_skipped(root: str) -> None:
    checkpoints = store(root, [10, 20, 30], keep_last=3)
    write_bytes(join(checkpoints.url(30), "model.safetensors"), b"torn")
    assert checkpoints.load_newest()[0] == 20
    remove(join(checkpoints.url(20), "optimizer.safetensors"))
    assert checkpoints.load_newest()[0] == 10


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b'{"step": 30, "fi',
        b"[]",
        b"{}",
        b'{"files": []}',
        b'{"files": {"x": 1}}',
        b'{"files": {"x": {"bytes": 1}}}',
    ],
)
def test_a_checkpoint_with_a_corrupt_manifest_is_skipped(root: str, manifest: bytes) -> None:
    checkpoints = store(root, [10, 20, 30], keep_last=3)
    write_bytes(join(checkpoints.url(30), MANIFEST), manifest)
    assert checkpoints.load_newest()[0] == 20
    assert checkpoints.ranked([10, 20, 30])[-1] == 30
    for read in (checkpoints.load, checkpoints.metrics):
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is corrupt"):
            read(30)


def test_an_uncommitted_checkpoint_is_never_read_and_is_removed(root: str) -> None:
    checkpoints = store(root, [10, 20])
    remove(join(checkpoints.url(20), MANIFEST))  # as if the writer had died before its commit
    assert checkpoints.load_newest()[0] == 10
    assert checkpoints.sweep() == [20]
    assert listdir(checkpoints.folder) == ["step-00000010"]


def test_files_left_by_a_killed_writer_are_removed(tmp_path: Path) -> None:
    checkpoints = store(str(tmp_path), [10])
    leftover = Path(checkpoints.url(10)) / f".{MANIFEST}.0123abcd"
    leftover.write_bytes(b"{")
    os.utime(leftover, (0, 0))
    assert checkpoints.sweep() == []
    assert not leftover.exists()
    assert checkpoints.load_newest()[0] == 10


def test_the_best_and_pinned_checkpoints_are_also_kept(tmp_path: Path) -> None:
    checkpoints = store(str(tmp_path), [10, 20, 30, 40, 50], keep_last=1, keep_best=1, pin_steps=(10,))
    assert checkpoints.committed() == [10, 20, 50]
    assert listdir(checkpoints.folder) == ["step-00000010", "step-00000020", "step-00000050"]


def test_waiting_for_a_failed_write_raises(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpoints = CheckpointStore(str(tmp_path / "checkpoints"), CheckpointConfig())
    checkpoints.save(10, snapshot(10), {})
    with pytest.raises(UploadError, match="could not be written"):
        checkpoints.wait()


def test_a_save_returns_before_a_slow_write_finishes_and_the_next_save_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import threading

    may_write, memory = threading.Event(), fsspec.filesystem("memory")
    put = type(memory).put_file
    monkeypatch.setattr(type(memory), "put_file", lambda *args, **kwargs: (may_write.wait(30), put(*args, **kwargs))[1])
    checkpoints = CheckpointStore("memory://slow/checkpoints", CheckpointConfig())
    checkpoints.save(10, snapshot(10), {})
    assert checkpoints.wait(timeout_s=0.01) is False
    may_write.set()
    checkpoints.save(20, snapshot(20), {})
    checkpoints.wait()
    assert checkpoints.committed() == [10, 20]
