"""Runs started by torchrun or Slurm are bit-identical to runs started by other launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import psutil
import pytest

from amd.config import ConfigError, TrainConfig, with_overrides
from amd.storage import join
from amd.training.__main__ import main
from amd.training.checkpoints.listing import newest_step
from amd.training.run_folder import run_folder
from amd.training.runs.torch_ranks import Place, find_place, first_host
from service.stack.ports import free_ports
from tests.support.processes import run_ranks
from tests.support.runs.tiny_runs import assert_same_bits, final_state, tiny_run, train_in_processes

SLURM = {
    "SLURM_PROCID": "11",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu7", "gpu7"), ("gpu[07-09,12],cpu1", "gpu07"), ("a-1,b[2-3]", "a-1"), ("rack2-gpu[3,5]", "rack2-gpu3")],
)
def test_the_first_host_in_a_compact_slurm_node_list_is_found(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_without_the_distributed_option_only_torchrun_is_detected() -> None:
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    rendezvous = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    torchrun = {**ranks, **rendezvous, "TORCHELASTIC_RUN_ID": "none"}
    assert find_place(False, torchrun) == find_place(True, torchrun) == Place(3, 4, 1, 2, "node1", 1234)
    assert find_place(False, {**ranks, **rendezvous}) is None
    assert find_place(True, {**ranks, **rendezvous}) == Place(3, 4, 1, 2, "node1", 1234)
    assert find_place(False, SLURM) is None
    assert find_place(True, SLURM) == Place(11, 16, 3, 8, "gpu07", 29956)
    with pytest.raises(ConfigError, match="no launcher started this process; use `torchrun"):
        find_place(True, {"SLURM_PROCID": "0"})


def slurm_task(config: str, rank: int, world: int, port: int) -> None:
    os.environ |= {
        **SLURM,
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_TASKS_PER_NODE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with Path(f"{config}-errors-{rank}").open("w") as errors, redirect_stderr(errors):
        code = main(["--config", config, "--distributed"])
    sys.exit(code)


def write_config(config: TrainConfig, path: Path) -> str:
    path.write_text(config.model_dump_json())
    return str(path)


def test_a_run_on_slurm_tasks_is_bit_identical_to_a_run_in_plain_processes(tmp_path: Path) -> None:
    """A teacher preset would also be trained on all ranks; here, both runs use existing teacher weights."""
    world = 4
    config = tiny_run(tmp_path, name="tasks", scaling__workers=world)
    path, port = write_config(config, tmp_path / "config.json"), free_ports(1)[0]
    assert run_ranks(slurm_task, [(path, rank, world, port) for rank in range(world)]) == [0] * world
    other = with_overrides(config, {"name": "other"})
    assert_same_bits(
        final_state(run_folder(str(config.storage), "tasks"), config),
        final_state(train_in_processes(other, world), config),
    )


def test_all_tasks_exit_with_code_2_on_an_invalid_config(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, data__train=str(tmp_path / "missing"))
    path, port = write_config(config, tmp_path / "config.json"), free_ports(1)[0]
    assert run_ranks(slurm_task, [(path, rank, 2, port) for rank in range(2)]) == [2, 2]
    errors = [Path(f"{path}-errors-{rank}").read_text() for rank in range(2)]
    assert errors[0].startswith("error: data.train: ")
    assert not errors[1]


def test_torchrun_restarts_a_run_after_a_rank_is_killed_and_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    steps, world = 48, 2
    config = tiny_run(tmp_path, name="killed", schedule__steps=steps, checkpoint__every_steps=4, scaling__workers=world)
    path, folder = write_config(config, tmp_path / "config.json"), run_folder(str(config.storage), "killed")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts", "1"]
    command += ["--standalone", "-m", "amd.training", "--config", path, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not 8 <= newest_step(folder) < steps:
            assert process.poll() is None
            time.sleep(0.02)
        _rank_process(process.pid, 1).kill()
        out, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    *_, result = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert (result["state"], result["steps"]) == ("succeeded", steps)
    whole = train_in_processes(with_overrides(config, {"name": "whole"}), world)
    assert_same_bits(final_state(folder, config), final_state(whole, config))
    assert newest_step(join(str(config.storage), "runs", "whole")) == steps


def _rank_process(launcher: int, rank: int) -> psutil.Process:
    ranks = psutil.Process(launcher).children()
    return next(process for process in ranks if process.environ().get("RANK") == str(rank))
