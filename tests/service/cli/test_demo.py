"""Tests for stopping `amd demo --local` with a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_S = 600.0  # the machine may be busy
SMALL_DEMO = """
from amd.data.dataset import demo
from service.cli.main import main

demo.IMAGES.update(dict.fromkeys(demo.IMAGES, 40))
main()
"""


def test_one_signal_stops_the_whole_demo_instead_of_only_its_current_run(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    command = [sys.executable, "-c", SMALL_DEMO, "demo", "--local", "--no-video", "--storage", str(storage)]
    environment = {**os.environ, "AMD_DEMO_DIR": str(tmp_path / "digits")}
    output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **output) as demo:
        until = time.monotonic() + START_S
        while not list(storage.glob("runs/*/config.json")) and demo.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        demo.send_signal(signal.SIGTERM)
        printed, _ = demo.communicate(timeout=START_S)
    assert (demo.returncode, "run the same command to continue" in printed) == (1, True), printed
    started = {path.name for path in storage.glob("runs/*")}
    assert not [name for name in started if name.startswith("demo-image-mae-s")], "the next run was started"
