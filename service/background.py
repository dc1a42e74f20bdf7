"""Monitor background loops, such as the reconciler: record when each loop last completed a step.

Used by the readiness check and the metrics. A loop that no longer completes steps also stops renewing its lease
(`service.db.leases`). Does not start threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STALLED_S = 300.0
"""Time without a completed step after which a loop counts as stalled, and another replica may take over its task."""
LATE_S = 60.0
"""Time without a completed step after which the readiness check reports a loop as failing."""


class StepMonitor:
    """Records the steps of one background loop. Thread-safe."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self._clock = name, clock
        self._lock = threading.Lock()
        self._completed_at = clock()  # a loop that never completes a step is as old as its monitor
        self._began_at: float | None = None
        self._error = ""
        self.has_lease: bool | None = None
        """Whether this process holds the loop's lease; None if the loop needs no lease."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record a step. A step that raises counts as completed, since the loop continues; its error is reported."""
        with self._lock:
            self._began_at = self._clock()
        error = ""
        try:
            yield
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            raise
        finally:
            with self._lock:
                self._completed_at, self._began_at, self._error = self._clock(), None, error

    @property
    def age_s(self) -> float:
        """Seconds since the last completed step."""
        with self._lock:
            return self._clock() - self._completed_at

    @property
    def is_stalled(self) -> bool:
        return self.age_s > STALLED_S

    def report(self) -> str:
        """Return `ok`, or a description of the problem."""
        with self._lock:
            age, error = self._clock() - self._completed_at, self._error
        if age > LATE_S:
            return f"has not completed a step for {age:.0f} s"
        return f"its last step failed: {error}" if error else "ok"
