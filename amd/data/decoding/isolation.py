"""Decoding in a process of its own: a decoder that hangs, crashes or eats all memory costs one sample, not the run.

A plain subprocess rather than multiprocessing: loader workers are daemons, which may have no children of that kind, and
the child must not be forked from a process that holds CUDA, threads or remote filesystems. Measured: two requests and a
16-frame clip through shared memory cost about 1 ms. Knows nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing.connection import Connection
from typing import Any

START_LIMIT_S = 120.0
KEEP_BYTES = 16 << 20  # of shared memory that is not given back between answers


class ChildFailed(Exception):
    """The child did not answer: it died, or was ended. One sentence; the next request starts a new one."""


class TookTooLong(ChildFailed):
    pass


class DecodingChild:
    """Starts its process at the first request, again after each failure, and anew in a forked copy of its owner."""

    module = "amd.data.decoding.worker"

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._running: _Running | None = None

    def request(self, message: dict[str, Any], deadline: float, content: bytes | None = None) -> dict[str, Any]:
        """Ask, and wait until `deadline` (time.monotonic). Raises ChildFailed.

        `content`: bytes that go along, through memory that both processes see.
        """
        running = self.start()
        if content is not None:
            running.send(content)
        try:
            running.connection.send_bytes(json.dumps(message).encode("utf-8", "surrogatepass"))
            if not running.connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TookTooLong("did not end in time")
            answer: dict[str, Any] = json.loads(running.connection.recv_bytes())
        except (EOFError, ConnectionError):
            cause = running.cause()
            self.close()
            raise ChildFailed(cause) from None
        return answer

    def received(self, size: int) -> memoryview:
        """The first `size` bytes that the last answer left in shared memory; valid until the next request."""
        running = self.start()
        if running.mapped is None or len(running.mapped) < size:
            running.mapped = mmap.mmap(running.memory, 0)
        return memoryview(running.mapped)[:size]

    def release(self) -> None:
        """Give back the memory of a large answer, which is no longer needed: the next one takes its own."""
        running = self._running
        if running is None or running.mapped is None or len(running.mapped) <= KEEP_BYTES:
            return
        if hasattr(mmap, "MADV_REMOVE"):
            running.mapped.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        if self._running is not None:
            self._running.end()
            self._running = None

    def start(self) -> _Running:
        """The live process, started if there is none: its start is not part of a sample's time."""
        if self._running is not None and self._running.owner != os.getpid():
            self._running.forget()
            self._running = None
        if self._running is None:
            self._running = _Running(self.module, self._options)
            weakref.finalize(self, self._running.end)
        return self._running

    def revive(self) -> None:
        """Between two samples: a process that somebody ended while it had nothing to do is no sample's fault."""
        running = self._running
        if running is not None and running.owner == os.getpid() and running.process.poll() is not None:
            self.close()
        self.start()

    def __getstate__(self) -> dict[str, Any]:
        return {"_options": self._options, "_running": None}


class _Running:
    """One live process, its socket and its shared memory."""

    def __init__(self, module: str, options: dict[str, Any]) -> None:
        self.owner = os.getpid()
        self.memory, self.inbox = _anonymous_file(), _anonymous_file()
        self.mapped: mmap.mmap | None = None
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        numbers = (theirs.fileno(), self.memory, self.inbox, self.owner)
        arguments = [*map(str, numbers), json.dumps(options)]
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(theirs.fileno(), self.memory, self.inbox),
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run, which then ends its children
            )
            theirs.close()
            self.connection = Connection(ours.detach())
            with contextlib.suppress(EOFError, ConnectionError):
                if self.connection.poll(START_LIMIT_S) and self.connection.recv_bytes():
                    return
            self.end()
            errors.seek(0)
            said = errors.read()[-2000:].decode("utf-8", "replace").strip()
        raise RuntimeError(
            f"the decoding process did not start within {START_LIMIT_S:.0f} s: {said or 'it said nothing'}"
        )

    def send(self, content: bytes) -> None:
        """Lay `content` where the child reads it; what lay there before goes."""
        os.ftruncate(self.inbox, 0)
        rest = memoryview(content)
        while rest:
            rest = rest[os.pwrite(self.inbox, rest, len(content) - len(rest)) :]

    def cause(self) -> str:
        """Why it stopped talking."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "made the decoding process stop answering"
        if code >= 0:
            return f"made the decoding process end (exit code {code})"
        names = {number.value: number.name for number in signal.Signals}
        return f"crashed the decoder ({names.get(-code, f'signal {-code}')})"

    def end(self) -> None:
        """Kill the process and wait for it; nothing in a forked copy, whose owner it is not."""
        if self.owner != os.getpid() or self.memory < 0:
            return
        self.process.kill()
        self.process.wait()
        self.connection.close()
        os.close(self.memory)
        os.close(self.inbox)
        self.memory = -1

    def forget(self) -> None:
        self.process.returncode = 0  # it is the other process's to wait for
        with contextlib.suppress(OSError):
            self.connection.close()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("amd-frames", os.MFD_CLOEXEC)  # not bounded by a container's small /dev/shm
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
