"""Ship a growing log to storage as immutable chunks, and capture a rank's output in such a log.

    logs/0000000000000000.log, 0000000000262144.log, …      each chunk is named after its offset in bytes

A reopened log continues after its last chunk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime

from amd.storage import join, listdir, read_bytes, write_bytes

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
TAIL_LINES = 40
RANK_CHUNKS_S = 5.0  # between chunks of a rank's log
RANK_OUTAGE_S = 30.0


def rank_log_folder(run_folder: str, rank: int) -> str:
    return join(run_folder, "logs", f"rank-{rank:05d}")


class LogShipper:
    """Ships a log as immutable chunks, each named after its offset. `write` is thread-safe and never blocks.

    `outage_s`: how long `close` retries while storage is unavailable.
    """

    def __init__(self, folder: str, interval_s: float, *, outage_s: float = 600.0) -> None:
        self._folder, self._interval_s, self._outage_s = folder, interval_s, outage_s
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._offset: int | None = None
        self._closing = threading.Event()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._thread = threading.Thread(target=self._work, name="log-shipper", daemon=True)
        self._thread.start()

    def write(self, text: bytes) -> None:
        """Append to the log; no-op once it is closed."""
        if not self._closing.is_set():
            with self._lock:
                self._pending += text
            self.tail.append(text.decode(errors="replace").rstrip("\n"))

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._ship()
        until = time.monotonic() + self._outage_s
        while self._pending and time.monotonic() < until and not self._ship():
            time.sleep(self._interval_s)

    def _ship(self) -> bool:
        """Write the pending bytes. Returns whether all were written; bytes that could not be written stay pending."""
        while self._pending:
            with self._lock:
                part = bytes(self._pending[:CHUNK_BYTES])
            try:
                if self._offset is None:
                    self._offset = next_offset(self._folder)
                write_bytes(join(self._folder, f"{self._offset:016d}.log"), part)
            except Exception as error:  # unavailable storage must not fail the job
                logger.warning("the log cannot be written; will retry: %s", error)
                return False
            with self._lock:
                del self._pending[: len(part)]
            self._offset += len(part)
        return True


def next_offset(folder: str) -> int:
    """Return the offset at which to continue a log: an attempt that Ray restarts appends to its earlier log."""
    names = [name for name in listdir(folder) if name.endswith(".log")]
    return int(names[-1].removesuffix(".log")) + len(read_bytes(join(folder, names[-1]))) if names else 0


@contextlib.contextmanager
def rank_log(run_folder: str, rank: int, world: int) -> Iterator[None]:
    """Ship the output of this process and its loader processes, including C libraries, to this rank's log.

    The output is also written to its original destination.
    """
    shipper = LogShipper(rank_log_folder(run_folder, rank), RANK_CHUNKS_S, outage_s=RANK_OUTAGE_S)
    started = (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} rank {rank} of {world} on {socket.gethostname()}, pid {os.getpid()}"
    )
    shipper.write(f"{started}\n".encode())
    try:
        with _copied(1, shipper), _copied(2, shipper):
            yield
    finally:
        shipper.close()


@contextlib.contextmanager
def _copied(descriptor: int, shipper: LogShipper) -> Iterator[None]:
    """Copy all output written to a file descriptor to a log, while the context is active."""
    previous, (reader, writer) = os.dup(descriptor), os.pipe()
    (sys.stdout if descriptor == 1 else sys.stderr).flush()
    os.dup2(writer, descriptor)
    os.close(writer)

    def copy() -> None:
        line = b""  # incomplete last line; only whole lines are shipped, since two descriptors share a log
        while part := os.read(reader, 65536):
            with contextlib.suppress(OSError):
                os.write(previous, part)
            lines, end, line = (line + part).rpartition(b"\n")
            shipper.write(lines + end)
            if len(line) > CHUNK_BYTES:
                shipper.write(line)
                line = b""
        shipper.write(line)
        os.close(reader)
        os.close(previous)

    thread = threading.Thread(target=copy, name=f"copy-output-{descriptor}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        (sys.stdout if descriptor == 1 else sys.stderr).flush()
        os.dup2(previous, descriptor)  # closes the pipe, unless a child process still holds it
        thread.join(1.0)
