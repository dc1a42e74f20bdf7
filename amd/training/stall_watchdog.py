"""Detect a rank that is making no progress, and report the stack traces of the rank and its loader processes.

Runs in a separate thread, because the training thread itself is blocked in a collective, a read or a library call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from amd.data.loading.stack_traces import own_traces, traces_of


class StallWatchdog:
    """Context manager that calls `on_stall` with a report if `progress` is not called for `timeout_s`."""

    def __init__(
        self,
        timeout_s: float | None,
        rank: int,
        loader_pids: Callable[[], Iterable[int]],
        on_stall: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s, self._rank, self._clock = timeout_s, rank, clock
        self._loader_pids, self._on_stall = loader_pids, on_stall
        self._since, self._step = clock(), 0
        self._closed = threading.Event()

    def progress(self, step: int | None = None) -> None:
        """Record that the rank has made progress: it has completed a step or an evaluation batch."""
        self._since = self._clock()
        self._step = self._step if step is None else step

    def __enter__(self) -> StallWatchdog:
        if self._timeout_s is not None:
            self.progress()
            threading.Thread(target=self._watch, name="stall-watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        assert self._timeout_s is not None
        while not self._closed.wait(min(self._timeout_s / 4, 5.0)):
            if self._clock() - self._since >= self._timeout_s:
                self._on_stall(self._report())
                return

    def _report(self) -> str:
        parts = [
            f"rank {self._rank} has made no progress for scaling.stall_timeout_s={self._timeout_s:g} s after step "
            f"{self._step}; stack traces:",
            own_traces(),
        ]
        for pid, traces in traces_of(self._loader_pids()).items():
            parts += [f"loader process {pid} of rank {self._rank}:", traces]
        return "\n".join(parts)
