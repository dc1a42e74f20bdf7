"""All ranks of a run stop, fail and report together. Each rank runs in a separate process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amd.config import with_overrides
from amd.data.faults import DataFault
from amd.storage import listdir
from amd.training.failures import NonFinite
from amd.training.process_group import ProcessGroup
from amd.training.reporting.media_files import media_steps
from amd.training.run_folder import RunSpec, spec_of
from amd.training.trainer.pretraining import work
from amd.training.trainer.run_hooks import LoopResult
from tests.support.processes import run_ranks
from tests.support.runs.tiny_runs import NullHooks, assert_same_bits, final_state, tiny_run, train_in_processes


class StopHooks(NullHooks):
    """Hooks that request a stop on rank 1 only, after the given number of polls."""

    def __init__(self, rank: int, calls: int) -> None:
        self.polls_left = calls if rank == 1 else 10**9

    def stop_requested(self) -> bool:
        self.polls_left -= 1
        return self.polls_left < 0


def run_rank(specs: list[dict[str, Any]], rank: int, world: int, folder: str) -> None:
    """Run three specs on one rank: bad samples, a non-finite loss, and a stop request."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    outcomes: list[Any] = []
    for spec, hooks in zip(specs, (NullHooks(), NullHooks(), StopHooks(rank, 3)), strict=True):
        try:
            outcomes.append(work(RunSpec(**spec), ProcessGroup(rank, world), hooks))
        except (DataFault, NonFinite) as error:
            outcomes.append((type(error).__name__, str(error)))
    torch.save(outcomes, f"{folder}/outcomes-{rank}")
    torch.distributed.destroy_process_group()


# 4 and 8 ranks run only in `make chaos`, because each rank starts three decoding processes.
@pytest.mark.timeout(1500)  # eight ranks on two cores take minutes
@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.chaos) for world in (4, 8))])
def test_a_run_of_any_world_size_resumes_bit_for_bit_after_a_rank_is_killed(tmp_path: Path, world: int) -> None:
    schedule = {"schedule__steps": 8, "checkpoint__every_steps": 3, "checkpoint__pin_steps": [2, 7]}
    config = tiny_run(tmp_path, name="killed", scaling__workers=world, **schedule)
    train_in_processes(config, world, killed_at_poll=5)
    folder = train_in_processes(config, world)
    assert 7 in [pictures.step for pictures in media_steps(folder)]
    whole = train_in_processes(with_overrides(config, {"name": "whole", "media.samples": 0}), world)
    assert media_steps(whole) == []
    assert_same_bits(final_state(folder, config), final_state(whole, config))


def test_all_ranks_end_with_the_same_result_or_error(tmp_path: Path) -> None:
    world = 2
    healthy, bad_samples = tiny_run(tmp_path / "healthy"), tiny_run(tmp_path / "bad_samples")
    for path in sorted((tmp_path / "bad_samples" / "images").rglob("*.png"))[:4]:
        path.write_bytes(b"not an image")
    runs = {
        "bad_samples": with_overrides(bad_samples, {"data.max_bad_fraction": 0.1}),
        "non_finite": with_overrides(healthy, {"optim.base_lr": 1e30, "optim.weight_decay": 0.0}),
        "stopped": healthy,
    }
    specs = [spec_of(name, str(tmp_path / "storage"), config, "").to_dict() for name, config in runs.items()]
    assert run_ranks(run_rank, [(specs, rank, world, str(tmp_path)) for rank in range(world)]) == [0] * world
    rank0, rank1 = (torch.load(tmp_path / f"outcomes-{rank}", weights_only=False) for rank in range(world))

    assert rank0[0] == rank1[0]
    kind, message = rank0[0]
    assert kind == "DataFault"
    assert message.count("bad_samples/images") >= 3
    assert rank0[1] == rank1[1]
    kind, message = rank0[1]
    assert kind == "NonFinite"
    assert message.startswith("step 3:")
    assert message.count("healthy/images") == 8, "the samples of both ranks"
    stopped_result: LoopResult = rank0[2]
    assert stopped_result == rank1[2]
    assert (stopped_result.finished, stopped_result.saved) == (False, True)
    assert 3 < stopped_result.steps < 12
    assert (
        listdir(str(tmp_path / "storage" / "runs" / "stopped" / "checkpoints"))[-1]
        == f"step-{stopped_result.steps:08d}"
    )
