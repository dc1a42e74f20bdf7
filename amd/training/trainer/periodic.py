"""Periodic requests: rank 0 raises them when its clock says they are due, and all ranks carry them out one step later.

Does not depend on torch: the clock is injected.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class PeriodicRequest:
    """A request that is due once per interval. After `due` has returned True, it waits for `restart`.

    Signals between ranks arrive one step late, so a request that stayed due until it was carried out would be raised
    twice.
    """

    def __init__(self, interval_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Create a request. A request whose interval is None is never due."""
        self._interval_s, self._clock = interval_s, clock
        self._since, self._pending = clock(), False

    def due(self) -> bool:
        """Return whether to raise the request now."""
        if self._pending or self._interval_s is None or self._clock() - self._since < self._interval_s:
            return False
        self._pending = True
        return True

    def restart(self) -> None:
        """Start the next interval. Call this once the request has been carried out or has become unnecessary."""
        self._since, self._pending = self._clock(), False
