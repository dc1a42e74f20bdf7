"""Turn SIGTERM and SIGINT into a stop request, which is checked between units of work."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignals:
    """Context manager that sets `stop` on SIGTERM and SIGINT; a second SIGINT interrupts immediately.

    Python handles signals only in the main thread; elsewhere `stop` is never set by a signal.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers. Call again after `ray.init`, whose own SIGTERM handler exits immediately."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                handler = signal.signal(number, self._on_signal)
                self._previous.setdefault(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop.set()
