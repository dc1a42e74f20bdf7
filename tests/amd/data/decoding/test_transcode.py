"""The same source gives the same bytes: nothing that could differ from one time to the next takes part."""

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
threads, over = set(), threading.Event()
def watch():
    while not over.is_set():
        threads.update(os.listdir("/proc/self/task"))
watcher = threading.Thread(target=watch)
watcher.start()
before = set(os.listdir("/proc/self/task"))
contents = [transcode(Path(path), "video", **sizes).content for path in sys.argv[1:] * 3]
over.set()
watcher.join()
print(len(threads - before), *[hashlib.sha256(content).hexdigest() for content in contents])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and fills memory as Linux and glibc do")
def test_bytes_depend_neither_on_threads_nor_on_what_lay_in_memory(tmp_path: Path) -> None:
    """Scaling with a thread for each core, FFmpeg's default, is what must not come back."""
    videos = [write_video(tmp_path / f"{size}.mp4", pictures(12, size, 64)) for size in (96, 100)]
    seen = set()
    for filling in ("1", "170"):  # glibc fills what it hands out with this
        environment = {**os.environ, "MALLOC_PERTURB_": filling, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", TRANSCODE, *map(str, videos)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        started, *digests = done.stdout.split()
        assert started == "0", "threads that FFmpeg started"
        seen |= set(digests)
    assert len(seen) == len(videos)
