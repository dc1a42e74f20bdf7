"""SIGTERM and SIGINT as a wish to stop, heard by whoever looks between two pieces of work."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignals:
    """`stop` is set by SIGTERM and SIGINT while the context lasts; a second SIGINT interrupts at once.

    Outside the main thread Python hears no signals, and it is never set.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Once more after `ray.init`, which puts a SIGTERM handler of its own in place: it ends the process at once."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.signal(number, self._hear)
                self._before.setdefault(number, previous)

    def _hear(self, number: int, frame: Any) -> None:
        if self.stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop.set()
