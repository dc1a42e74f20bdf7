"""Tests for decoder isolation: a bad decoder affects only one sample, and its process never outlives its owner."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from amd.config import DataConfig
from amd.data.dataset.record import Record
from amd.data.decoding.isolation import START_TRIES
from amd.data.decoding.limits import FileLimits
from amd.data.decoding.reader import BadSample, SampleReader
from amd.data.faults import LoaderCrash
from tests.support.data.hostile_decoder import HostileReader
from tests.support.data.videos import pictures, write_video

LIMITS = FileLimits(bytes=1 << 20, pixels=10_000, frames=20, duration_s=5.0, decoded_bytes=1_000_000)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "good.mp4", pictures(8))


def _first(total: int) -> np.ndarray:
    return np.array([0])


def _video(path: Path) -> Record:
    return Record(str(path), None, "video")


def _pid(reader: SampleReader) -> int:
    process = reader._child._process
    assert process is not None
    return process.process.pid


def _exited(pid: int, within_s: float = 10.0) -> bool:
    """Return whether the process is dead and has been reaped, by this process or by the system."""
    for _ in range(int(within_s * 20)):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z" and os.getppid() != 0 and not _is_ours(pid):
            return True
        time.sleep(0.05)
    return False


def _is_ours(pid: int) -> bool:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hangs", r"took longer than its limit of 1\.5 s to read and decode; a retry in a fresh process also failed"),
        ("spins", r"took longer than its limit of 1\.5 s to read and decode; a retry in a fresh process also failed"),
        ("segfaults", r"crashed the decoder \(SIGSEGV\); a retry in a fresh process also failed"),
        ("killed", r"crashed the decoder \(SIGKILL\); a retry in a fresh process also failed"),
        ("exits", r"terminated the decoding process \(exit code 7\); a retry in a fresh process also failed"),
        ("eats", "needs more memory than data.read_memory_mib allows"),
        ("raises", "ZeroDivisionError: unexpected"),
    ],
)
def test_a_misbehaving_decoder_affects_only_one_sample(name: str, reason: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.mp4"
    shutil.copy(good, path)
    reader = HostileReader(DataConfig(train="x", read_timeout_s=1.5))
    with pytest.raises(BadSample, match=reason) as error:
        reader.read_clip(_video(path), _first)
    assert error.value.record == _video(path)
    assert reader.read_clip(_video(good), _first).shape == (1, 64, 96, 3)
    reader.close()


@pytest.mark.parametrize("name", ["killed_once", "hangs_once", "exits_once"])
def test_a_sample_is_not_blamed_for_a_process_that_dies_or_stalls_only_once(
    name: str, good: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.mp4"
    shutil.copy(good, path)
    with closing(HostileReader(DataConfig(train="x", read_timeout_s=1.5))) as reader:
        np.testing.assert_array_equal(reader.read_clip(_video(path), _first), reader.read_clip(_video(good), _first))
    assert path.with_suffix(".opened").exists(), "the first process did not reach the file"


def test_an_untrusted_file_is_retried_after_a_crash_but_not_after_a_stall(good: Path, tmp_path: Path) -> None:
    for name in ("hangs_once", "killed_once"):
        shutil.copy(good, tmp_path / f"{name}.mp4")
    with closing(HostileReader(DataConfig(train="", read_timeout_s=1.5), LIMITS)) as reader:
        with pytest.raises(BadSample, match=r"took longer than its limit of 1\.5 s to read and decode$"):
            reader.read_file(str(tmp_path / "hangs_once.mp4"), _first)
        assert reader.read_file(str(tmp_path / "killed_once.mp4"), _first).pixels.shape == (1, 64, 96, 3)


def test_a_process_killed_during_startup_is_replaced_without_blaming_a_sample(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = tmp_path / "kills"
    monkeypatch.setenv("KILLED_STARTS", str(kills))
    kills.write_bytes(b"x" * (START_TRIES - 1))
    with closing(HostileReader(DataConfig(train="x"))) as reader:
        assert reader.read_clip(_video(good), _first).shape == (1, 64, 96, 3)
    kills.write_bytes(b"x" * START_TRIES)
    with (
        closing(HostileReader(DataConfig(train="x"))) as reader,
        pytest.raises(LoaderCrash, match=r"killed during startup 3 times \(SIGKILL\).*data\.loader_workers"),
    ):
        reader.read_clip(_video(good), _first)


def test_closing_or_deleting_a_reader_stops_its_process(good: Path) -> None:
    for drop in (False, True):
        reader = SampleReader(DataConfig(train="x"))
        reader.read_clip(_video(good), _first)
        pid = _pid(reader)
        if drop:
            del reader
            gc.collect()
        else:
            reader.close()
        assert not Path(f"/proc/{pid}").exists()


def test_a_closed_reader_can_read_again(good: Path) -> None:
    reader = SampleReader(DataConfig(train="x"))
    first = reader.read_clip(_video(good), _first)
    reader.close()
    np.testing.assert_array_equal(reader.read_clip(_video(good), _first), first)
    reader.close()


def test_crashes_leak_no_file_descriptors(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "exits.mp4"
    shutil.copy(good, path)
    reader = HostileReader(DataConfig(train="x"))
    counts = []
    for _ in range(3):
        with pytest.raises(BadSample):
            reader.read_clip(_video(path), _first)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[0] == counts[-1]


def test_a_forked_copy_starts_a_separate_process(good: Path) -> None:
    reader = SampleReader(DataConfig(train="x"))
    reader.read_clip(_video(good), _first)
    before = _pid(reader)
    child = os.fork()
    if child == 0:
        ok = reader.read_clip(_video(good), _first).shape == (1, 64, 96, 3) and _pid(reader) != before
        reader.close()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.read_clip(_video(good), _first).shape == (1, 64, 96, 3)
    assert _pid(reader) == before
    reader.close()


def test_a_pickled_reader_has_no_process(good: Path) -> None:
    reader = SampleReader(DataConfig(train="x"))
    reader.read_clip(_video(good), _first)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._child._process is None
    assert copy.read_clip(_video(good), _first).shape == (1, 64, 96, 3)
    copy.close()
    reader.close()


OWNER = """
import sys, threading, time
from amd.config import DataConfig
from amd.data.dataset.record import Record
from tests.support.data.hostile_decoder import HostileReader
reader = HostileReader(DataConfig(train="x", read_timeout_s=600))
running = reader._child.start()
print(running.process.pid, flush=True)
reader.read_clip(Record(sys.argv[1], None, "video"), lambda total: [0])
time.sleep(600)
"""


@pytest.mark.parametrize("name", ["hangs", "idle"])
def test_the_process_exits_when_its_owner_is_killed(name: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.mp4"
    shutil.copy(good, path)
    command = [sys.executable, "-c", OWNER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[4]) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        time.sleep(0.5)
        owner.send_signal(signal.SIGKILL)
    assert _exited(pid)
