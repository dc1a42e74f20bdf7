"""Bounds on the numbers in a job's config, checked when the job is submitted.

Configs limit only a few numbers, because a run on the user's own machine may use any size that fits. A service must
also reject sizes that no cluster can run, before such jobs wait in the queue forever or exhaust a node. Independent of
the actual cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from amd.config import ConfigError
from service.jobs.kinds import resources_of
from tune_spaces.config import SearchConfig

MAX_WORKERS = 4096
MAX_INTEGER = 2**53  # exact in JSON
MAX_SECONDS = 366 * 86400.0

# Largest value by the last part of a field's name.
BOUNDS: dict[str, float] = {
    "at_once": MAX_WORKERS,
    "batch_size": 2**24,
    "cpus_per_worker": 1024,
    "depth": 1024,
    "draws": 10_000,
    "epochs": 1_000_000,
    "frames": 4096,
    "heads": 1024,
    "image_size": 16_384,
    "keep_last": 100_000,
    "memory_mib": 2**20,
    "micro_batch": 2**24,
    "mlp_ratio": 64,
    "patch": 1024,
    "prefetch_batches": 1024,
    "read_memory_mib": 2**20,
    "resolution": 1024,
    "shard_mib": 2**20,
    "short_side": 16_384,
    "size": 16_384,
    "steps": 10**10,
    "threads_per_worker": 1024,
    "trials": 100_000,
    "tubelet": 1024,
    "width": 65_536,
    "workers": MAX_WORKERS,
}
_VALUES_OF_A_DIMENSION = ("choices", "low", "high", "step")


def check_bounds(config: BaseModel, max_project_workers: int | None = None) -> None:
    """Raise ConfigError for numbers that no cluster can handle, and for more workers than the project may use."""
    problems = [
        f"{field}={value}: must be at most {bound:g}, since no job needs more; lower it"
        for field, value, bound in _numbers(config.model_dump(mode="json"), "", "")
        if abs(value) > bound
    ]
    needed = resources_of(config)
    trials = " for all concurrent trials (at_once)" if isinstance(config, SearchConfig) else ""
    if not problems and needed.workers > MAX_WORKERS:
        problems.append(
            f"scaling.workers: the job needs {needed.workers} workers{trials}, but the maximum is {MAX_WORKERS}; "
            "lower the number"
        )
    if not problems and max_project_workers is not None and needed.workers > max_project_workers:
        problems.append(
            f"scaling.workers: the job needs {needed.workers} workers{trials}, but a project may use at most "
            f"{max_project_workers} (AMD_PROJECT_MAX_WORKERS); lower the number, or the job would never start"
        )
    if problems:
        raise ConfigError(problems)


def _numbers(value: Any, field: str, name: str) -> Iterator[tuple[str, float, float]]:
    """Yield (dotted field, number, bound) for each number in a config, including the values of sweep dimensions."""
    if isinstance(value, dict):
        for key, inner in value.items():
            last = name if key in _VALUES_OF_A_DIMENSION else key.rpartition(".")[2]
            yield from _numbers(inner, f"{field}.{key}".lstrip("."), last)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, field, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield field, value, BOUNDS.get(name, MAX_SECONDS if name.endswith("_s") else MAX_INTEGER)
