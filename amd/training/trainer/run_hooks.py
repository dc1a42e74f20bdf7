"""Interface between the training loop and its environment: hooks for Ray, signals and terminals, and LoopResult."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from amd.training.reporting.progress import Event


class RunHooks(Protocol):
    """The loop's connection to its environment: stop requests, preemption and events."""

    def stop_requested(self) -> bool:
        """Return whether this process has received SIGTERM or a cancel request. Called every step; must be cheap."""

    def preempted(self) -> bool:
        """Return whether a node of the group is about to be preempted. This is a barrier, so call it on all ranks."""

    def emit(self, event: Event) -> None:
        """Report an event to the run's watcher. Called only on rank 0."""

    def stalled(self, report: str) -> None:
        """Report that this rank has hung, and terminate it. Called on any rank, from a thread that is not blocked."""


class Interrupted(Exception):
    """Raised on all ranks when a stop request interrupts `evaluate` or `finalize`. A resumed run repeats the call."""


@dataclass(frozen=True)
class LoopResult:
    """A run's progress when its training loop returns."""

    steps: int
    """Number of completed optimizer steps."""
    finished: bool
    """Whether the run is complete; False after a stop or a pause."""
    saved: bool
    """Whether the last step's checkpoint is committed."""
    metrics: dict[str, float] = field(default_factory=dict)
