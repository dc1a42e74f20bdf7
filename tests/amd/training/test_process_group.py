"""Tests for process groups, which consecutive runs in the same processes open and close."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

from amd.training.process_group import ProcessGroup, Signals
from tests.support.processes import run_ranks


def resources() -> tuple[int, int]:
    """Return the numbers of open file descriptors and threads in this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def run_many(rank: int, world: int, rendezvous: str, fails: bool) -> None:
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    found = []
    for _ in range(6):
        with contextlib.suppress(KeyError), contextlib.closing(ProcessGroup(rank, world)) as group:
            assert group.gather(rank) == list(range(world))
            group.exchange(Signals(bad=1))
            assert group.exchange(Signals()).bad == world
            if fails:
                raise KeyError("a run that fails with signals pending")
            group.collect()
        torch.distributed.barrier()
        found.append(resources())
    assert found[-1][0] <= found[0][0], f"file descriptors and threads after each run: {found}"
    assert found[-1][1] <= found[0][1], f"file descriptors and threads after each run: {found}"
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts file descriptors in /proc")
@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
def test_consecutive_runs_do_not_accumulate_connections_or_threads(tmp_path: Path, fails: bool) -> None:
    world, rendezvous = 2, f"file://{tmp_path / 'rendezvous'}"
    assert run_ranks(run_many, [(rank, world, rendezvous, fails) for rank in range(world)]) == [0] * world


def test_a_single_rank_closes_without_torch_distributed() -> None:
    group = ProcessGroup()
    group.close()
    assert group.gather(1) == [1]
