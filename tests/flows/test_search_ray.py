"""A sweep on Ray Tune, and what may befall it: a worker killed, a trial's driver killed, the sweep's driver killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from amd.training.launch import launch
from amd.training.metrics import read_metrics
from amd.training.run import RunResult, run_folder
from tests.ray_cluster import RayCluster
from tests.runs import in_a_process, tiny_run
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, TrialRecord
from tune_spaces.points import next_point
from tune_spaces.search import prepared
from tune_spaces.spaces import config_of
from tune_spaces.worker import TRIAL

pytestmark = pytest.mark.ray
STEPS = 60
METRIC = "eval/knn_top1"


def a_sweep(folder: Path) -> SearchConfig:
    train = tiny_run(folder, schedule__steps=STEPS, checkpoint__every_steps=6, tracking__log_every_steps=6)
    data = {"train": str(folder / "images"), "test": str(folder / "images"), "loader_workers": 0}
    probe = {"data": data, "knn": {"neighbours": 3}}
    values = {
        "train": {**train.model_dump(mode="json"), "probe": probe},
        "space": {"use": ["masking"]},
        "rungs": 2,
        "reduction": 2,
        "budget": {"trials": 4},
        "at_once": 1,
        "seed": 5,
        "storage": str(folder / "storage"),
        "name": "rough",
    }
    return SearchConfig.model_validate(values)


Outcome = tuple[dict[str, Any], list[float], str]  # point, score at each rung, state of a trial


def undisturbed(config: SearchConfig, root: str) -> list[Outcome]:
    """What must come out, by a plain loop: no Ray, no Tune, halving by hand."""
    config, space = prepared(config.model_copy(update={"storage": root}), root, "calm")
    ledger = Ledger(run_folder(root, "calm"))
    outcomes, told = list[Outcome](), list[float]()
    for number in range(config.budget.trials):
        point = next_point(config, space, ledger)
        assert point is not None
        train, run_id = config_of(space, point), f"calm-{number}"
        scores = [probed(launch(train, TRIAL, local=True, run_id=run_id, until=STEPS // 2, quiet=True), STEPS // 2)]
        goes_on = not told or scores[0] >= median(told)
        told.append(scores[0])
        if goes_on:
            scores.append(probed(launch(train, TRIAL, local=True, run_id=run_id, quiet=True), STEPS))
        outcomes.append((point, scores, "succeeded" if goes_on else "stopped"))
        ledger.records[number] = TrialRecord(number=number, point=point, overrides={}, state="succeeded", began=0)
    return outcomes


def probed(run: RunResult, step: int) -> float:
    assert run.state in ("paused", "succeeded"), run.message
    figures = [line[METRIC] for line in read_metrics(run.run_folder) if line["step"] == step and METRIC in line]
    assert len(figures) == 1
    return figures[0]


@pytest.mark.timeout(1500)  # Ray Train starts four times: minutes on a busy machine
def test_a_sweep_whose_worker_trial_and_driver_are_killed_ends_as_an_undisturbed_one(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    config = a_sweep(tmp_path)
    file = tmp_path / "sweep.json"
    file.write_text(config.model_dump_json())
    ledger = str(tmp_path / "storage" / "runs" / "rough")

    driver = start(file)
    wait_for(lambda: steps_of(tmp_path, 0) >= 12, driver)
    kill(ray_cluster, "RayTrainWorker")
    wait_for(lambda: len(Ledger(ledger).records[0].rungs) == 1, driver)
    kill(ray_cluster, "ImplicitFunc")
    wait_for(lambda: Ledger(ledger).records[0].attempts == 2, driver)
    wait_for(lambda: 1 in Ledger(ledger).records, driver)
    first = (tmp_path / "storage" / "runs" / "rough" / "trials" / "0000.json").read_bytes()
    driver.send_signal(signal.SIGKILL)
    driver.wait()

    again = start(file)
    printed, complaint = again.communicate(timeout=900)
    assert again.returncode == 0, complaint
    result = json.loads(printed.strip().splitlines()[-1])
    records = Ledger(ledger).records
    assert (tmp_path / "storage" / "runs" / "rough" / "trials" / "0000.json").read_bytes() == first, "it had ended"
    found = [(record.point, [rung.score for rung in record.rungs], record.state) for record in records.values()]
    assert found == undisturbed(config, str(tmp_path / "calm"))
    assert result["trials"] == {state: [r.state for r in records.values()].count(state) for state in result["trials"]}
    assert Path(result["best"]["config"]).exists()

    wait_for(lambda: in_a_process(free, ray_cluster.address), None)


def start(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tune_spaces", "--config", str(file), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_of(folder: Path, number: int) -> int:
    lines = read_metrics(run_folder(str(folder / "storage"), f"rough-{number:04d}-s0"))
    return max((int(line["step"]) for line in lines), default=0)


def wait_for(happened: Callable[[], bool], driver: subprocess.Popen[str] | None, seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if happened():
                return
        except KeyError:  # no such trial yet
            pass
        if driver is not None and driver.poll() is not None:
            raise AssertionError(f"the sweep ended too early: {driver.communicate()}")
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.3)


def kill(cluster: RayCluster, kind: str) -> None:
    """Kill -9 a live actor's process, by the actor's class."""
    listed = json.load(urllib.request.urlopen(f"{cluster.dashboard}/api/v0/actors?detail=1", timeout=30))
    pids = [
        actor["pid"]
        for actor in listed["data"]["result"]["result"]
        if actor["state"] == "ALIVE" and actor["class_name"] == kind
    ]
    assert pids, f"no {kind} is alive"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def free(address: str) -> bool:
    """Whether every CPU of the cluster is free again."""
    import ray

    ray.init(address, logging_level="error")
    return bool(ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
