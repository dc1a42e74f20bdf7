"""The wire between workers and driver: an actor that hands out runs, where workers leave events and the driver its wish
to stop.

Imports nothing, so that its process is there in a second.
"""

from __future__ import annotations

from typing import Any

WAIT = "wait"  # no run yet: ask again


class Board:
    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._task: dict[str, Any] | None = None
        self._number = self._finished = 0
        self._stop = self._closed = False

    # The driver's side

    def offer(self, task: dict[str, Any]) -> None:
        """A run for all workers; one at a time."""
        self._number += 1
        self._task, self._stop = {**task, "number": self._number}, False

    def take(self) -> list[dict[str, Any]]:
        """What was told since the last time."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        self._stop = True

    def close(self) -> None:
        """No more runs: workers that ask for one end."""
        self._closed = True

    # The workers' side

    def task_after(self, number: int) -> dict[str, Any] | str | None:
        """The run to work on for a worker whose last one was `number`; WAIT, or None when there are no more.

        A worker that Ray started anew asks with 0 and joins the run that is going on.
        """
        if self._task is not None and self._number > max(number, self._finished):
            return self._task
        return None if self._closed else WAIT

    def tell(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def finish(self, number: int, outcome: dict[str, Any]) -> None:
        self._finished = number
        self._events.append({"kind": "outcome", **outcome})

    def stop_requested(self) -> bool:
        return self._stop
