"""Periodically discover published encoders, and runs started outside the service, under the storage root.

Separate from the reconciler, because listing a large storage root takes a long time and must not delay jobs. Only one
of several control planes scans at a time.
"""

from __future__ import annotations

import contextlib
import logging
import threading

from amd.storage import StorageError
from service.background import StepMonitor
from service.db.leases import LeaseKeeper, run_steps
from service.jobs.execution.external import ExternalRunDiscovery
from service.registry.discovery import EncoderDiscovery
from service.web.errors import ClusterUnavailable

logger = logging.getLogger(__name__)

TASK = "discovery"
INTERVAL_S = 1.0


class StorageScanner:
    """Scans the storage root periodically; most scans find nothing new to read."""

    def __init__(self, runs: ExternalRunDiscovery, encoders: EncoderDiscovery, lease: LeaseKeeper) -> None:
        self._runs = runs
        self._scans = (("external runs", runs.scan), ("published encoders", encoders.scan))
        self.lease, self.monitor = lease, StepMonitor(TASK)

    def run(self, stop: threading.Event) -> None:
        """Scan until `stop` is set. Any error is logged, and the next step retries."""
        run_steps(
            self.step,
            stop,
            INTERVAL_S,
            self.lease,
            self.monitor,
            on_error=lambda _: logger.exception("discovery step failed; will retry"),
        )

    def step(self) -> bool:
        """Scan once. Returns whether this process holds the lease."""
        if not self.lease.acquire():
            return False
        with contextlib.suppress(ClusterUnavailable):  # tried again in the next step
            self._runs.stop_cancelled()
        for what, scan in self._scans:
            try:
                scan()
            except StorageError as error:
                logger.warning("%s cannot be scanned: %s", what, error)
        return True
