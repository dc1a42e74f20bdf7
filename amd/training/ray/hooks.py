"""The training loop's hooks on a Ray Train worker: stop requests, preemption and events, through the coordinator."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

from amd.training.reporting.progress import Event

STALL_REPORT_S = 10.0  # watchdogs of different ranks act within 5 s of each other


class RayRunHooks:
    """RunHooks for one worker during one run.

    Metrics do not go through `ray.train.report`: Ray 2.60 buffers one report and collects it at its health check, once
    a second, so a run that logs more often would block.
    """

    def __init__(self, coordinator: Any, rank: int) -> None:
        self._coordinator = coordinator
        self._stop, self._closed = threading.Event(), threading.Event()
        if rank == 0:
            listen_for_stop(coordinator, self._stop, self._closed)
            self.emit({"kind": "workers", "placement_group": _placement_group()})

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def preempted(self) -> bool:
        import ray.train

        return ray.train.get_preemption_info() is not None

    def emit(self, event: Event) -> None:
        self._coordinator.emit.remote(event)

    def stalled(self, report: str) -> None:
        """Send the report to the driver and exit: a blocked thread cannot be interrupted.

        Ray Train terminates the other workers once it notices. Waiting first gives them time to send their reports.
        """
        import ray

        with contextlib.suppress(Exception):  # the coordinator may be gone too
            ray.get(self._coordinator.emit.remote({"kind": "stall", "text": report}), timeout=STALL_REPORT_S)
        time.sleep(STALL_REPORT_S)
        os._exit(1)

    def close(self) -> None:
        self._closed.set()


def listen_for_stop(coordinator: Any, stop: threading.Event, closed: threading.Event, trial: int | None = None) -> None:
    """Set `stop` once the driver requests it. Polls in a thread that exits when `closed` is set.

    `trial`: in a sweep, the number of this trial, which can be stopped without stopping the sweep.
    """
    import ray

    def poll() -> None:
        while not closed.wait(1.0):
            try:
                if ray.get(coordinator.stop_requested.remote(trial), timeout=30):
                    stop.set()
                    return
            except Exception:  # the driver has died, which ends this process too
                return

    threading.Thread(target=poll, name="stop-listener", daemon=True).start()


def _placement_group() -> str | None:
    """Return the ID of this worker's placement group, so that another process can release it."""
    from ray.util.placement_group import get_current_placement_group

    group = get_current_placement_group()
    return group.id.hex() if group is not None else None
