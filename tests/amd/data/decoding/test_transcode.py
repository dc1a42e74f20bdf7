"""Transcoding is deterministic: the same source always produces the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.data.videos import pictures, write_video

TRANSCODE = """
import hashlib, os, sys, threading
from pathlib import Path
from amd.data.decoding.transcode import transcode

sizes = {"short_side": 32, "gop": 8, "crf": 23, "frame_rate": None, "quality": 90}
threads, stopped = set(), threading.Event()
def record_threads():
    while not stopped.is_set():
        threads.update(os.listdir("/proc/self/task"))
watcher = threading.Thread(target=record_threads)
watcher.start()
before = set(os.listdir("/proc/self/task"))
contents = [transcode(Path(path), "video", **sizes).content for path in sys.argv[1:] * 3]
stopped.set()
watcher.join()
print(len(threads - before), *[hashlib.sha256(content).hexdigest() for content in contents])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="relies on /proc and on glibc")
def test_encoded_bytes_depend_neither_on_threads_nor_on_uninitialised_memory(tmp_path: Path) -> None:
    """Guards against FFmpeg's default of scaling with one thread per core."""
    videos = [write_video(tmp_path / f"{size}.mp4", pictures(12, size, 64)) for size in (96, 100)]
    all_digests = set()
    for filling in ("1", "170"):  # glibc fills allocated memory with this byte
        environment = {**os.environ, "MALLOC_PERTURB_": filling, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", TRANSCODE, *map(str, videos)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        started, *digests = done.stdout.split()
        assert started == "0", "FFmpeg started threads"
        all_digests |= set(digests)
    assert len(all_digests) == len(videos)
