"""Isolate decoding in a child process: a decoder that hangs, crashes or exhausts memory affects one sample, not a run.

Uses a plain subprocess rather than multiprocessing: loader workers are daemons, which may not have multiprocessing
children, and the child must not be forked from a process with CUDA, threads or remote filesystems. The overhead
of a 16-frame clip (two requests, pixels in shared memory) is about 1 ms. Does not interpret the content of requests.
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

from amd.data.faults import LoaderCrash

START_LIMIT_S = 120.0
START_TRIES = 3  # attempts to start a process that is killed during startup
KEEP_BYTES = 16 << 20  # shared memory kept between responses


class ChildFailed(Exception):
    """Raised when the child died or was killed, with a one-sentence reason. The next request starts a new child."""


class ChildTimeout(ChildFailed):
    """Raised when the child did not respond before the deadline."""


class DecodingChild:
    """A decoding process. Starts on the first request and restarts after a failure; a forked copy starts a new
    process."""

    module = "amd.data.decoding.worker"

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._process: _ChildProcess | None = None

    def request(self, message: dict[str, Any], deadline: float, content: bytes | None = None) -> dict[str, Any]:
        """Send a request and wait for the response until `deadline` (time.monotonic).

        `content`: bytes to pass along in shared memory. Raises ChildFailed if the process dies or misses the deadline,
        or LoaderCrash if it cannot be started.
        """
        running = self.start()
        if content is not None:
            running.send(content)
        try:
            running.connection.send_bytes(json.dumps(message).encode("utf-8", "surrogatepass"))
            if not running.connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise ChildTimeout("did not respond in time")
            response: dict[str, Any] = json.loads(running.connection.recv_bytes())
        except (EOFError, OSError):
            exit_reason = running.exit_reason()
            self.close()
            raise ChildFailed(exit_reason) from None
        return response

    def shared_bytes(self, size: int) -> memoryview:
        """Return the first `size` bytes of the last response in shared memory; valid until the next request."""
        running = self.start()
        if running.mapped is None or len(running.mapped) < size:
            running.mapped = mmap.mmap(running.memory, 0)
        return memoryview(running.mapped)[:size]

    def release(self) -> None:
        """Release the shared memory of a large response that is no longer needed."""
        running = self._process
        if running is None or running.mapped is None or len(running.mapped) <= KEEP_BYTES:
            return
        if hasattr(mmap, "MADV_REMOVE"):
            running.mapped.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process = None

    def start(self) -> _ChildProcess:
        """Return the running process, starting it if necessary. A sample's time limit does not include startup."""
        if self._process is not None and self._process.owner != os.getpid():
            self._process.detach()
            self._process = None
        if self._process is None:
            self._process = self._new_process()
            weakref.finalize(self, self._process.terminate)
        return self._process

    def _new_process(self) -> _ChildProcess:
        """Start a process, retrying if it is killed during startup, when no sample can be the cause."""
        for tries_left in reversed(range(START_TRIES)):
            try:
                return _ChildProcess(self.module, self._options)
            except ChildFailed as error:
                if not tries_left:
                    raise LoaderCrash(
                        f"the decoding process was killed during startup {START_TRIES} times ({error}); if memory is "
                        "short, lower data.loader_workers"
                    ) from None
        raise AssertionError("unreachable: the last attempt returns or raises")

    def ensure_running(self) -> None:
        """Restart the process if it was killed while idle, so that the next sample does not fail as a result."""
        running = self._process
        if running is not None and running.owner == os.getpid() and running.process.poll() is not None:
            self.close()
        self.start()

    def __getstate__(self) -> dict[str, Any]:
        return {"_options": self._options, "_process": None}


class _ChildProcess:
    """A running process with its socket and shared memory."""

    def __init__(self, module: str, options: dict[str, Any]) -> None:
        self.owner = os.getpid()
        self.memory, self.inbox = _anonymous_file(), _anonymous_file()
        self.mapped: mmap.mmap | None = None
        parent_end, child_end = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["MALLOC_ARENA_MAX"] = "2"  # each per-thread arena takes 64 MiB of the limited address space
        environment["TOKIO_WORKER_THREADS"] = "1"  # of obstore, which would start one per CPU, with 2 MiB each
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        numbers = (child_end.fileno(), self.memory, self.inbox, self.owner)
        arguments = [*map(str, numbers), json.dumps(options)]
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(child_end.fileno(), self.memory, self.inbox),
                env=environment,
                start_new_session=True,  # the parent handles Ctrl-C and stops its children
            )
            child_end.close()
            self.connection = Connection(parent_end.detach())
            killed_by = None
            try:
                if self.connection.poll(START_LIMIT_S) and self.connection.recv_bytes():
                    return
            except (EOFError, OSError):
                killed_by = self._killed_by()
            is_late = self.process.poll() is None
            self.terminate()
            if killed_by is not None:
                raise ChildFailed(killed_by)
            errors.seek(0)
            stderr = errors.read()[-2000:].decode("utf-8", "replace").strip() or "no output"
        if is_late:
            raise LoaderCrash(f"the decoding process did not start within {START_LIMIT_S:.0f} s: {stderr}")
        raise RuntimeError(f"the decoding process exited during startup: {stderr}")

    def send(self, content: bytes) -> None:
        """Write `content` to the child's inbox, replacing its previous content."""
        os.ftruncate(self.inbox, 0)
        rest = memoryview(content)
        while rest:
            rest = rest[os.pwrite(self.inbox, rest, len(content) - len(rest)) :]

    def exit_reason(self) -> str:
        """Return why the process stopped responding."""
        killed_by = self._killed_by()
        if killed_by is not None:
            return f"crashed the decoder ({killed_by})"
        if self.process.returncode is None:
            return "made the decoding process unresponsive"
        return f"terminated the decoding process (exit code {self.process.returncode})"

    def _killed_by(self) -> str | None:
        """Wait for the process to exit; return the signal that killed it, or None if it exited or is still alive."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        code = self.process.returncode
        if code is None or code >= 0:
            return None
        names = {number.value: number.name for number in signal.Signals}
        return names.get(-code, f"signal {-code}")

    def terminate(self) -> None:
        """Kill the process and wait for it. No-op in a forked copy, which does not own the process."""
        if self.owner != os.getpid() or self.memory < 0:
            return
        self.process.kill()
        self.process.wait()
        self.connection.close()
        os.close(self.memory)
        os.close(self.inbox)
        self.memory = -1

    def detach(self) -> None:
        """Release the process without ending it; called in forked copies of its owner."""
        self.process.returncode = 0  # the owner waits for it
        with contextlib.suppress(OSError):
            self.connection.close()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("amd-frames", os.MFD_CLOEXEC)  # not limited by a container's small /dev/shm
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
