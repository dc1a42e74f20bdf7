"""Collect stack traces from this process and its loader processes, even if their interpreter is blocked.

A loader process dumps its traces on SIGUSR1, into memory that another process reads through /proc, so no file is left
on disk. Only this process's traces are available on systems other than Linux.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

_NAME = "amd-stack-traces"
_LIMIT = 1_000_000  # bytes read per process


def dump_on_signal() -> None:
    """Make this process dump its traces when `traces_of` requests them."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(_NAME)  # open until the process ends
        faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)


def own_traces() -> str:
    """Return the stack traces of all threads of this process, the calling thread first."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def traces_of(pids: Iterable[int], wait_s: float = 2.0) -> dict[int, str]:
    """Return the traces of processes that called `dump_on_signal`; empty for processes that do not respond in time."""
    files = {pid: file for pid in pids if (file := _memory_of(pid)) is not None}
    sizes = {pid: file.stat().st_size for pid, file in files.items()}
    for pid in files:
        os.kill(pid, signal.SIGUSR1)
    until = time.monotonic() + wait_s
    while any(file.stat().st_size == sizes[pid] for pid, file in files.items()) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.05)  # a dump takes several writes
    return {pid: file.read_bytes()[sizes[pid] :][:_LIMIT].decode(errors="replace") for pid, file in files.items()}


def _memory_of(pid: int) -> Path | None:
    """Return the path to the memory that a process dumps its traces to; None if the process must not be signalled."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        return next((path for path in descriptors if _NAME in os.readlink(path)), None)
    except OSError:  # the process has ended
        return None
