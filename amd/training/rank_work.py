"""Run an attempt on one of several ranks, with any launcher: set up its threads, process group and log."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from amd.training.reporting.log_chunks import rank_log
from amd.training.run_folder import RunSpec

if TYPE_CHECKING:
    import torch


def work_path(work: Callable[..., Any]) -> str:
    """Return `module:name`, which another process can receive without importing torch, unlike a pickled function."""
    return f"{work.__module__}:{work.__qualname__}"


def work_on_rank(
    work: Callable[..., Any],
    spec: RunSpec,
    hooks: Any,
    *,
    rank: int,
    world: int,
    local_world: int,
    device: torch.device,
) -> dict[str, Any]:
    """Call `work(spec, group, hooks)`, and return its LoopResult as plain data. All ranks call this together.

    `local_world`: number of ranks on this node, which share its cores.
    """
    import torch

    from amd.training.process_group import ProcessGroup

    cores = (os.cpu_count() or 1) // local_world
    torch.set_num_threads(spec.scaling().threads_per_worker or max(1, cores))
    with closing(ProcessGroup(rank, world, device)) as group, rank_log(spec.folder, rank, world):
        return asdict(work(spec, group, hooks))
