"""The coordinator actor: hands runs to workers, collects their events, and passes on the driver's stop request.

Imports nothing heavy, so the process starts within a second.
"""

from __future__ import annotations

from typing import Any

WAIT = "wait"  # no run is available yet; poll again


class CoordinatorActor:
    """State shared by a driver and its workers. Runs as a Ray actor that reserves no CPU."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._task: dict[str, Any] | None = None
        self._number = self._finished = 0
        self._stop = self._closed = False
        self._stopped_trials: set[int] = set()
        self._running = self._resizing = False

    # Called by the driver

    def submit(self, task: dict[str, Any]) -> None:
        """Offer a run to all workers; only one run is active at a time. Clears an earlier stop request."""
        self._number += 1
        self._task, self._stop = {**task, "number": self._number}, False

    def drain_events(self) -> list[dict[str, Any]]:
        """Return the events received since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Ask the workers to stop the current run."""
        self._stop = True

    def stop_trial(self, number: int) -> None:
        """Ask the workers to stop one trial of a sweep."""
        self._stopped_trials.add(number)

    def close(self) -> None:
        """Make workers exit when they poll for the next run."""
        self._closed = True

    # Called by Ray Train's controller

    def begin_resize(self) -> bool:
        """Request a checkpoint before the workers are replaced; return whether a run is in progress."""
        self._resizing = self._running
        return self._running

    def is_checkpointed(self) -> bool:
        """Return whether the workers have stopped the run since `begin_resize`."""
        return not self._running

    def end_resize(self) -> None:
        """Let new workers continue the run."""
        self._running = self._resizing = False

    # Called by the workers

    def next_task(self, number: int) -> dict[str, Any] | str | None:
        """Return the run after run `number`, WAIT if there is none yet, or None once the actor is closed.

        A worker that Ray has restarted passes 0 and joins the current run.
        """
        if self._task is not None and self._number > max(number, self._finished):
            self._running = True
            return self._task
        return None if self._closed else WAIT

    def emit(self, event: dict[str, Any]) -> None:
        """Queue an event for the driver."""
        self._events.append(event)

    def finish(self, number: int, outcome: dict[str, Any]) -> None:
        """Record the outcome of run `number`, unless its workers stopped because they are being replaced."""
        self._running = False
        if self._resizing and not self._stop and not outcome["finished"]:
            return
        self._finished = number
        self._events.append({"kind": "outcome", **outcome})

    def stop_requested(self, trial: int | None = None) -> bool:
        """Return whether the current run or, in a sweep, this trial should stop."""
        return self._stop or self._resizing or trial in self._stopped_trials
