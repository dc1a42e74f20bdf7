"""The local cache is bounded, evicts the least recently used file, survives SIGKILL and is safe for concurrent use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.data.fetching.cache import LocalCache

ROOT = Path(__file__).parents[4]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "files").glob("*/*"))


def _age(path: Path | None, seconds: float) -> None:
    assert path is not None
    os.utime(path, (time.time() - seconds,) * 2)


def test_get_returns_what_put_stored(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1000)
    assert cache.get("s3://b/x") is None
    path = cache.put("s3://b/x", b"hello")
    assert path == cache.get("s3://b/x")
    assert path is not None
    assert path.read_bytes() == b"hello"


def test_the_least_recently_used_file_is_evicted_first(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1000)
    for age, key in ((30, "a"), (20, "b"), (10, "c")):
        _age(cache.put(key, bytes(300)), age)
    cache.get("a")
    cache.put("d", bytes(300))
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]


def test_a_file_larger_than_the_cache_is_not_stored(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 100)
    assert cache.put("a", bytes(101)) is None
    assert cache.put("b", bytes(100)) is not None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 400)), max_size=40))
def test_the_size_never_exceeds_the_limit(
    tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = LocalCache(folder, 1000)
    for key, size in puts:
        path = cache.put(str(key), bytes([key]) * size)
        assert path is not None
        assert set(path.read_bytes()) <= {key}
        assert _size(folder) <= 1000


def test_an_invalid_running_total_is_recomputed(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1000)
    cache.put("a", bytes(600))
    (tmp_path / "total").write_text("nonsense")
    cache.put("b", bytes(600))
    assert _size(tmp_path) == 600


WRITER = """
import sys
from amd.data.fetching.cache import LocalCache
cache = LocalCache(sys.argv[1], 200_000)
seed = int(sys.argv[2])
n = 0
print("ready", flush=True)
while True:
    key = (seed * 7 + n) % 50
    path = cache.get(str(key)) or cache.put(str(key), bytes([key]) * (5000 + key * 100))
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = None  # evicted by another process in between
    if content is not None and content != bytes([key]) * (5000 + key * 100):
        print("torn", flush=True)
        sys.exit(1)
    n += 1
"""


def test_killed_processes_leave_complete_files_within_the_limit(tmp_path: Path) -> None:
    for attempt in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path), str(3 * attempt + k)], stdout=subprocess.PIPE, cwd=ROOT
            )
            for k in range(3)
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.4)
        for writer in writers:
            assert writer.poll() is None, "a process read an incomplete file"
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        assert _size(tmp_path) <= 200_000
        for path in (tmp_path / "files").glob("*/*"):
            content = path.read_bytes()
            assert content == content[:1] * (5000 + content[0] * 100)
