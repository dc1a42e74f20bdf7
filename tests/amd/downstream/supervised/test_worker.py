"""Tests for supervised runs on two ranks in separate processes, one of which may be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amd.config import DetectionConfig, with_overrides
from amd.downstream.supervised.classification.run import work as finetuning_work
from amd.downstream.supervised.detection.run import work as detection_work
from amd.storage import join, listdir, read_json
from amd.training.checkpoints.store import CheckpointStore
from amd.training.process_group import ProcessGroup
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.run_folder import RunSpec, spec_of
from tests.support.data.ava_videos import draw, tiny_detection
from tests.support.processes import run_ranks
from tests.support.runs.finetuning import tiny_finetuning
from tests.support.runs.tiny_runs import NullHooks, assert_same_bits, final_state, train_in_processes


def test_a_run_is_bit_identical_after_a_rank_is_killed_mid_epoch(tmp_path: Path) -> None:
    config = tiny_finetuning(
        tmp_path,
        name="uninterrupted",
        schedule={"epochs": 2},
        optim__ema_decay=0.5,
        scaling__workers=2,
        scaling__micro_batch=2,
        checkpoint__every_steps=2,
    )
    uninterrupted = train_in_processes(config, 2, finetuning_work)
    killed = with_overrides(config, {"name": "killed"})
    # The rank dies after step 5: it polls for stops after steps 1-3, at three validation batches, after steps 4 and 5.
    folder = train_in_processes(killed, 2, finetuning_work, killed_at_poll=8)
    store = CheckpointStore(join(folder, "checkpoints"), killed.checkpoint)
    assert 0 < store.committed()[-1] < 6, "the rank died before the end"
    assert train_in_processes(killed, 2, finetuning_work) == folder
    assert_same_bits(final_state(folder, killed), final_state(uninterrupted, config))
    results = [read_json(join(run, "test", "result.json")) for run in (folder, uninterrupted)]
    assert results[0] == results[1]
    assert [name for name in listdir(join(folder, "test")) if name.startswith("views")] == [
        "views-0000.parquet",
        "views-0001.parquet",
    ]


def _spec(config: DetectionConfig) -> RunSpec:
    assert config.name is not None
    assert config.storage is not None
    return spec_of(config.name, config.storage, config, "")


def _rank(spec: dict[str, Any], rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    outcome = detection_work(RunSpec(**spec), ProcessGroup(rank, world), NullHooks())
    assert "test/map" in outcome.metrics
    torch.distributed.destroy_process_group()


def test_two_detection_workers_produce_the_same_weights_and_metrics_as_one(tmp_path: Path) -> None:
    draw(tmp_path)
    schedule = {"schedule__steps": 3, "encoder__drop_path": 0.0}  # drop path differs between ranks
    one, two = (tiny_detection(tmp_path, name=name, **schedule) for name in ("one", "two"))
    detection_work(_spec(one), ProcessGroup(), NullHooks())
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    assert run_ranks(_rank, [(_spec(two).to_dict(), rank, 2, rendezvous) for rank in range(2)]) == [0, 0]
    expected, state = final_state(_spec(one).folder, one), final_state(_spec(two).folder, two)
    for name, value in expected.items():
        torch.testing.assert_close(value, state[name], atol=1e-4, rtol=1e-3)
    figures = [[line for line in read_metrics(_spec(c).folder) if "test/map" in line][-1] for c in (one, two)]
    assert figures[0]["test/map"] == figures[1]["test/map"]
    assert figures[0]["test/unreadable"] == figures[1]["test/unreadable"] == 0
