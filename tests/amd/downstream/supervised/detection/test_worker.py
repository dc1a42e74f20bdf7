"""Two workers produce the same weights and metrics as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amd.config import DetectionConfig
from amd.downstream.supervised.detection.worker import work
from amd.training.process_group import ProcessGroup
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.run_folder import RunSpec, spec_of
from tests.support.data.ava_videos import draw, tiny_detection
from tests.support.runs.tiny_runs import NullHooks, final_state


def _spec(config: DetectionConfig) -> RunSpec:
    assert config.name is not None
    assert config.storage is not None
    return spec_of(config.name, config.storage, config, "")


def _rank(spec: dict[str, Any], rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    outcome = work(RunSpec(**spec), ProcessGroup(rank, world), NullHooks())
    assert "test/map" in outcome.metrics
    torch.distributed.destroy_process_group()


def test_two_workers_produce_the_same_weights_and_metrics_as_one(tmp_path: Path) -> None:
    draw(tmp_path)
    schedule = {"schedule__steps": 3, "encoder__drop_path": 0.0}  # drop path differs between ranks
    one, two = (tiny_detection(tmp_path, name=name, **schedule) for name in ("one", "two"))
    work(_spec(one), ProcessGroup(), NullHooks())
    context = torch.multiprocessing.get_context("spawn")
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    ranks = [context.Process(target=_rank, args=(_spec(two).to_dict(), rank, 2, rendezvous)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    expected, state = final_state(_spec(one).folder, one), final_state(_spec(two).folder, two)
    for name, value in expected.items():
        torch.testing.assert_close(value, state[name], atol=1e-4, rtol=1e-3)
    figures = [[line for line in read_metrics(_spec(c).folder) if "test/map" in line][-1] for c in (one, two)]
    assert figures[0]["test/map"] == figures[1]["test/map"]
    assert figures[0]["test/unreadable"] == figures[1]["test/unreadable"] == 0
