"""Several ranks in processes of their own: what concerns all of them, all of them do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amd.config import with_overrides
from amd.data.faults import DataFault
from amd.storage import listdir
from amd.training.failures import NonFinite
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunSpec, spec_of
from amd.training.trainer.pretraining import LoopResult, work
from tests.support.runs.tiny_runs import Quiet, tiny_run


class StopAfter(Quiet):
    """Only rank 1 hears of the stop."""

    def __init__(self, rank: int, calls: int) -> None:
        self.left = calls if rank == 1 else 10**9

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def three_fates(specs: list[dict[str, Any]], rank: int, world: int, folder: str) -> None:
    """In a process: a run with bad data, one that explodes, one that is stopped."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    ends: list[Any] = []
    for spec, hooks in zip(specs, (Quiet(), Quiet(), StopAfter(rank, 3)), strict=True):
        try:
            ends.append(work(RunSpec(**spec), ProcessGroup(rank, world), hooks))
        except (DataFault, NonFinite) as error:
            ends.append((type(error).__name__, str(error)))
    torch.save(ends, f"{folder}/ends-{rank}")
    torch.distributed.destroy_process_group()


def test_ranks_stop_together_and_say_the_same(tmp_path: Path) -> None:
    world = 2
    healthy, rotten = tiny_run(tmp_path / "healthy"), tiny_run(tmp_path / "rotten")
    for path in sorted((tmp_path / "rotten" / "images").rglob("*.png"))[:4]:
        path.write_bytes(b"not an image")
    runs = {
        "rotten": with_overrides(rotten, {"data.max_bad_fraction": 0.1}),
        "wild": with_overrides(healthy, {"optim.base_lr": 1e30, "optim.weight_decay": 0.0}),
        "stopped": healthy,
    }
    specs = [spec_of(name, str(tmp_path / "storage"), config, "").to_dict() for name, config in runs.items()]
    torch.multiprocessing.spawn(_rank, args=(specs, world, str(tmp_path)), nprocs=world)
    first, second = (torch.load(tmp_path / f"ends-{rank}", weights_only=False) for rank in range(world))

    assert first[0] == second[0]
    kind, message = first[0]
    assert kind == "DataFault"
    assert message.count("rotten/images") >= 3
    assert first[1] == second[1]
    kind, message = first[1]
    assert kind == "NonFinite"
    assert message.startswith("step 3:")
    assert message.count("healthy/images") == 8, "the samples of both ranks"
    outcome: LoopResult = first[2]
    assert outcome == second[2]
    assert (outcome.finished, outcome.saved) == (False, True)
    assert 3 < outcome.steps < 12
    assert listdir(str(tmp_path / "storage" / "runs" / "stopped" / "checkpoints"))[-1] == f"step-{outcome.steps:08d}"


def _rank(rank: int, specs: list[dict[str, Any]], world: int, folder: str) -> None:
    three_fates(specs, rank, world, folder)
