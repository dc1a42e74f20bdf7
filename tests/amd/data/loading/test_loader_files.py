"""Tests for loading/loader.py and loading/processes.py end to end: real files, S3, killed processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amd.bench.data import write_videos
from amd.config import ClipConfig, DataConfig
from amd.data.dataset.open import open_manifest
from amd.data.loading.loader import Batch, ClipLoader
from amd.storage import filesystem, write_bytes
from tests.support.data import remote_folder
from tests.support.data.remote_decoder import RemoteReader

CLIP = ClipConfig(frames=4, size=32, patch=16, sampling_rate_frames=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six short videos; the second is truncated and the fifth is empty."""
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder, gop=6, count=6, seconds=1, size=(48, 64))
    files = sorted(folder.iterdir())
    files[1].write_bytes(files[1].read_bytes()[:2000])
    files[4].write_bytes(b"")
    return folder


def _data(train: str, **values: object) -> DataConfig:
    return DataConfig.model_validate(
        {"train": train, "format": "video_folder", "repeats": 2, "loader_workers": 2, **values}
    )


def _read(data: DataConfig, steps: int = 6) -> list[Batch]:
    with ClipLoader(data, CLIP, open_manifest(data), batch_size=3, micro_batch=2, seed=1) as loader:
        return [batch for step in loader.steps(0, steps) for batch in step]


def _pixels(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.clips for batch in batches])


def test_videos_are_read_identically_by_any_number_of_processes(videos: Path) -> None:
    in_process, in_workers = (_read(_data(str(videos), loader_workers=workers)) for workers in (0, 2))
    assert torch.equal(_pixels(in_process), _pixels(in_workers))
    assert _pixels(in_process).float().std() > 10  # real content, not blank frames
    for batches in (in_process, in_workers):
        bad = {(Path(b["location"]).name, b["record"]) for batch in batches for b in batch.bad}
        assert bad == {("clip1.mp4", 1), ("clip4.mp4", 4)}
    read = {int(number) for batch in in_workers for number in batch.records}
    assert read == {0, 2, 3, 5}


def test_loader_processes_can_read_a_store_that_the_training_process_uses(videos: Path, s3_root: str) -> None:
    """s3fs keeps a thread and locks in the training process, so loader processes must not be forked from it."""
    for file in videos.iterdir():
        write_bytes(f"{s3_root}/videos/{file.name}", file.read_bytes())
    assert len(filesystem(s3_root)[0].ls(f"{s3_root}/videos")) == 6
    assert torch.equal(_pixels(_read(_data(f"{s3_root}/videos"))), _pixels(_read(_data(str(videos)))))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="requires /proc")
def test_a_killed_training_process_leaves_no_process_behind(videos: Path) -> None:
    """Also checks that a training script needs no `if __name__ == "__main__"` guard."""
    script = f"""
import time
from tests.amd.data.loading.test_loader_files import CLIP, ClipLoader, _data, open_manifest
data = _data({str(videos)!r})
loader = ClipLoader(data, CLIP, open_manifest(data), batch_size=3)
next(loader.steps(0, 1000))
print("reading", flush=True)
time.sleep(600)
"""
    training = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4]
    )
    assert training.stdout is not None
    assert training.stdout.readline() == "reading\n"
    descendants = _descendants(training.pid)
    assert len(descendants) >= 5  # the fork server, two loader processes, two decoding processes
    training.send_signal(signal.SIGKILL)
    training.wait()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in descendants if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _descendants(pid: int) -> list[int]:
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _alive(int(folder.name)):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    descendants = [pid]
    for member in descendants:
        descendants += [child for child, parent in parents.items() if parent == member]
    return descendants[1:]


def test_no_sample_is_lost_if_a_decoding_process_is_killed_between_reads(videos: Path) -> None:
    """See test_isolation for processes that die while reading a sample."""
    data = _data(str(videos), loader_workers=0)
    with ClipLoader(data, CLIP, open_manifest(data), batch_size=3, seed=1) as loader:
        steps = loader.steps(0, 50)
        next(steps)
        (decoding,) = [pid for pid in _descendants(os.getpid()) if b"amd.data.decoding.worker" in _command(pid)]
        os.kill(decoding, signal.SIGKILL)
        # Wait for its last thread: a zombie may still have running threads.
        os.waitid(os.P_PID, decoding, os.WEXITED | os.WNOWAIT)
        (batch,) = next(steps)
    assert not [bad for bad in batch.bad if "SIGKILL" in bad["reason"]]
    assert len(batch.clips) == 6


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _frame_folders(folder: Path, count: int = 5) -> Path:
    """Write frame folders and a list file. The second folder has no frames; the frames of the fourth are not images."""
    noise = np.random.default_rng(0)
    for n in range(count):
        (folder / f"video {n}").mkdir(parents=True)
        for frame in range(12):
            image = Image.fromarray(noise.integers(0, 256, (40, 48, 3), dtype=np.uint8))
            image.save(folder / f"video {n}" / f"img_{frame + 1:05}.jpg")
    for frame in range(1, 13):
        (folder / "video 1" / f"img_{frame:05}.jpg").unlink()
        (folder / "video 3" / f"img_{frame:05}.jpg").write_bytes(b"not an image")
    (folder / "list.txt").write_text("".join(f"video {n} 12 {n}\n" for n in range(count)))
    return folder / "list.txt"


@pytest.mark.parametrize("kind", ["videos", "frames"])
def test_reading_ahead_changes_neither_samples_nor_bad_samples(kind: str, videos: Path, tmp_path: Path) -> None:
    remote_folder.register()
    local = videos if kind == "videos" else _frame_folders(tmp_path)
    changes = {"format": "auto", "flip": True, "max_bad_fraction": 1.0}

    def read(prefix: str, workers: int, *starts: int) -> list[list[Batch]]:
        data = _data(f"{prefix}{local}", loader_workers=workers, **changes)
        manifest = open_manifest(data)
        options: dict[str, Any] = {"batch_size": 3, "micro_batch": 2, "seed": 1, "open_reader": RemoteReader}
        with ClipLoader(data, CLIP, manifest, **options) as loader:
            return [[batch for step in loader.steps(start, 4) for batch in step] for start in starts]

    def facts(batches: list[Batch]) -> list[Any]:
        places = [[(bad["record"], Path(bad["location"]).name, bad["reason"]) for bad in one.bad] for one in batches]
        return [[one.records.tolist() for one in batches], [one.labels.tolist() for one in batches], places]

    (expected,) = read("", 0, 0)
    (in_process,) = read("remote://", 0, 0)
    assert facts(in_process) == facts(expected)
    assert torch.equal(_pixels(in_process), _pixels(expected))
    in_workers, resumed = read("remote://", 2, 0, 2)
    assert torch.equal(_pixels(in_workers), _pixels(expected))
    assert torch.equal(_pixels(resumed), _pixels(expected)[-len(_pixels(resumed)) :])
    assert any(batch.bad for batch in expected)
