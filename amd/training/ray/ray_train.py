"""Ray interface for other packages: connect to a cluster, run one attempt on it, and reuse its workers.

Within `amd.training`, only this package imports Ray. Each call to `fit` is one attempt; `runs.attempts` counts retries
and charges failures to their budgets.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from amd.config import ScalingConfig
from amd.training.ray.cluster import FORWARDED, free_workers, join_cluster, uses_gpu
from amd.training.ray.hooks import listen_for_stop
from amd.training.ray.worker_group import close_groups, worker_group
from amd.training.reporting.progress import Watcher
from amd.training.run_folder import RunSpec

__all__ = ["FORWARDED", "close_groups", "cluster", "fit", "free_workers", "listen_for_stop", "uses_gpu"]


@contextlib.contextmanager
def cluster(scaling: ScalingConfig, log: Callable[[str], None]) -> Iterator[None]:
    """Connect to a Ray cluster for the duration of the context.

    Uses the current cluster, the one at RAY_ADDRESS, or a new one on loopback. Worker groups are reused until the
    outermost such context exits.
    """
    with join_cluster(scaling, log), _worker_groups_open():
        yield


_depth = 0


@contextlib.contextmanager
def _worker_groups_open() -> Iterator[None]:
    """Close all worker groups when the outermost such context exits."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            close_groups()


def fit(
    spec: RunSpec,
    work: Callable[..., Any],
    scaling: ScalingConfig,
    deadline_s: float,
    stop: threading.Event,
    watcher: Watcher,
) -> dict[str, Any] | None:
    """Run one attempt; return its outcome as plain data, or None if a stop exceeded its deadline.

    Raises InfeasibleResources or an error from Ray Train.
    """
    group = worker_group(spec, scaling, stop)
    outcome = group.attempt(spec, work, deadline_s, stop, watcher)
    if not group.reusable:
        group.close()
    return outcome
