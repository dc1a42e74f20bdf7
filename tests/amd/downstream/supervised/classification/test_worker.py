"""Two ranks in separate processes, one of them killed."""

from __future__ import annotations

from pathlib import Path

from amd.config import with_overrides
from amd.downstream.supervised.classification.worker import work
from amd.storage import join, listdir, read_json
from amd.training.checkpoints.store import CheckpointStore
from tests.support.runs.finetuning import tiny_finetuning
from tests.support.runs.tiny_runs import assert_same_bits, final_state, train_in_processes


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
    uninterrupted = train_in_processes(config, 2, work)
    killed = with_overrides(config, {"name": "killed"})
    # The rank dies after step 5: it polls for stops after steps 1-3, at three validation batches, after steps 4 and 5.
    folder = train_in_processes(killed, 2, work, killed_at_poll=8)
    store = CheckpointStore(join(folder, "checkpoints"), killed.checkpoint)
    assert 0 < store.committed()[-1] < 6, "the rank died before the end"
    assert train_in_processes(killed, 2, work) == folder
    assert_same_bits(final_state(folder, killed), final_state(uninterrupted, config))
    results = [read_json(join(run, "test", "result.json")) for run in (folder, uninterrupted)]
    assert results[0] == results[1]
    assert [name for name in listdir(join(folder, "test")) if name.startswith("views")] == [
        "views-0000.parquet",
        "views-0001.parquet",
    ]
