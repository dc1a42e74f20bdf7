"""Tests for sweeps on Ray Tune whose training worker, trial, driver or whole cluster is killed."""

from __future__ import annotations

import json
import os
import random
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

from amd.config import with_overrides
from amd.storage import exists, join
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.run_folder import RunResult, run_folder
from amd.training.runs.launch import launch
from tests.support.ray_cluster import RayCluster
from tests.support.runs.tiny_runs import tiny_run
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, TrialRecord
from tune_spaces.search.run import prepare_search
from tune_spaces.search.sampler import next_point
from tune_spaces.search.worker import TRIAL
from tune_spaces.spaces.space import config_of

pytestmark = pytest.mark.ray
STEPS = 300
METRIC = "eval/knn_top1"


def a_sweep(folder: Path) -> SearchConfig:
    train = tiny_run(folder, schedule__steps=STEPS, checkpoint__every_steps=30, tracking__log_every_steps=6)
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
        "name": "interrupted",
    }
    return SearchConfig.model_validate(values)


TrialOutcome = tuple[dict[str, Any], list[float], str]  # a trial's point, its score at each rung, and its state


def reference_outcomes(config: SearchConfig, root: str) -> list[TrialOutcome]:
    """Compute the expected result without Ray Tune, using a plain loop and an inline halving rule."""
    config, space = prepare_search(config.model_copy(update={"storage": root}), root, "reference")
    ledger = Ledger(run_folder(root, "reference"))
    outcomes, reported = list[TrialOutcome](), list[float]()
    for number in range(config.budget.trials):
        point = next_point(config, space, ledger)
        assert point is not None
        train, run_id = config_of(space, point), f"reference-{number}"
        scores = [
            probe_score(launch(train, TRIAL, local=True, run_id=run_id, until=STEPS // 2, quiet=True), STEPS // 2)
        ]
        continues = not reported or scores[0] >= median(reported)
        reported.append(scores[0])
        if continues:
            scores.append(probe_score(launch(train, TRIAL, local=True, run_id=run_id, quiet=True), STEPS))
        outcomes.append((point, scores, "succeeded" if continues else "stopped"))
        ledger.records[number] = TrialRecord(number=number, point=point, overrides={}, state="succeeded", began=0)
    return outcomes


def probe_score(run: RunResult, step: int) -> float:
    assert run.state in ("paused", "succeeded"), run.message
    figures = [line[METRIC] for line in read_metrics(run.run_folder) if line["step"] == step and METRIC in line]
    assert len(figures) == 1
    return float(figures[0])


@pytest.mark.chaos
@pytest.mark.timeout(1500)  # Ray Train starts four times: minutes on a busy machine
def test_a_sweep_whose_worker_trial_and_driver_are_killed_returns_the_same_result(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    config = a_sweep(tmp_path)
    file = tmp_path / "sweep.json"
    file.write_text(config.model_dump_json())
    ledger = str(tmp_path / "storage" / "runs" / "interrupted")

    driver = start(file)
    wait_for(lambda: steps_of(tmp_path, 0) >= 12, driver)
    kill(ray_cluster, "RayTrainWorker")
    wait_for(lambda: len(Ledger(ledger).records[0].rungs) == 1, driver)
    kill(ray_cluster, "ImplicitFunc")
    wait_for(lambda: Ledger(ledger).records[0].attempts == 2, driver)
    wait_for(lambda: 1 in Ledger(ledger).records, driver)
    first = (tmp_path / "storage" / "runs" / "interrupted" / "trials" / "0000.json").read_bytes()
    driver.send_signal(signal.SIGKILL)
    driver.wait()

    again = start(file)
    out, err = again.communicate(timeout=900)
    assert again.returncode == 0, err
    result = json.loads(out.strip().splitlines()[-1])
    records = Ledger(ledger).records
    assert (tmp_path / "storage" / "runs" / "interrupted" / "trials" / "0000.json").read_bytes() == first, (
        "an ended trial must not change"
    )
    found = [(record.point, [rung.score for rung in record.rungs], record.state) for record in records.values()]
    assert found == reference_outcomes(config, str(tmp_path / "reference"))
    assert result["trials"] == {state: [r.state for r in records.values()].count(state) for state in result["trials"]}
    assert Path(result["best"]["config"]).exists()

    wait_for(lambda: is_idle(ray_cluster), None)


def start(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tune_spaces", "--config", str(file), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_of(folder: Path, number: int) -> int:
    lines = read_metrics(run_folder(str(folder / "storage"), f"interrupted-{number:04d}-s0"))
    return max((int(line["step"]) for line in lines), default=0)


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[str] | None, seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except KeyError:  # no such trial yet
            pass
        if driver is not None and driver.poll() is not None:
            raise AssertionError(f"the sweep ended too early: {driver.communicate()}")
        assert time.monotonic() < until, "the condition was not met in time"
        time.sleep(0.3)


def list_state(cluster: RayCluster, resource: str) -> list[dict[str, Any]]:
    response = urllib.request.urlopen(f"{cluster.dashboard}/api/v0/{resource}?detail=1&limit=1000", timeout=30)
    found: list[dict[str, Any]] = json.load(response)["data"]["result"]["result"]
    return found


def kill(cluster: RayCluster, class_name: str) -> None:
    """Send SIGKILL to the processes of all live actors with this class name."""
    actors = list_state(cluster, "actors")
    pids = [actor["pid"] for actor in actors if actor["state"] == "ALIVE" and actor["class_name"] == class_name]
    assert pids, f"no {class_name} is alive"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def used_cpus(cluster: RayCluster) -> float:
    status = json.load(urllib.request.urlopen(f"{cluster.dashboard}/api/cluster_status", timeout=30))
    return float(status["data"]["clusterStatus"]["loadMetricsReport"]["usage"]["CPU"][0])


def is_idle(cluster: RayCluster) -> bool:
    """Return whether all CPUs are free, no placement group remains, and only Ray's internal actors are alive."""
    remaining = [group for group in list_state(cluster, "placement_groups") if group["state"] != "REMOVED"]
    alive = {actor["class_name"] for actor in list_state(cluster, "actors") if actor["state"] != "DEAD"}
    return used_cpus(cluster) == 0 and not remaining and alive <= {"_AutoscalingCoordinatorActor"}


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_random_stops_leak_no_resources_and_the_sweep_finishes(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Request four concurrent trials with two workers each on a cluster that fits only two trials."""
    config = with_overrides(
        a_sweep(tmp_path),
        {"train.scaling.workers": 2, "at_once": 4, "stopping": "none", "rungs": 1, "name": "stopped-at-random"},
    )
    file = tmp_path / "sweep.json"
    file.write_text(config.model_dump_json())
    rng = random.Random(3)
    for stop_signal in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        driver = start(file)
        if rng.random() < 0.75:
            wait_for(lambda: used_cpus(ray_cluster) > 0, driver)
        time.sleep(rng.uniform(0, 12))
        driver.send_signal(stop_signal)
        driver.wait(300)
        wait_for(lambda: is_idle(ray_cluster), None)

    again = start(file)
    _, err = again.communicate(timeout=900)
    assert again.returncode == 0, err
    assert "at once    2 trials with 2 workers each (fewer than at_once: not enough resources)" in err
    records = Ledger(run_folder(str(tmp_path / "storage"), "stopped-at-random")).records
    assert [record.state for record in records.values()] == ["succeeded"] * 4
    wait_for(lambda: is_idle(ray_cluster), None)


def test_a_sweep_that_does_not_fit_the_cluster_is_rejected_immediately(ray_cluster: RayCluster, tmp_path: Path) -> None:
    config = with_overrides(
        a_sweep(tmp_path), {"train.scaling.workers": 5, "train.optim.batch_size": 10, "name": "too-many"}
    )
    file = tmp_path / "sweep.json"
    file.write_text(config.model_dump_json())
    out, err = start(file).communicate(timeout=300)
    assert "train.scaling.workers=5 of 1 CPU each do not fit: the cluster's nodes have 4 CPU" in out + err
    assert not Ledger(run_folder(str(tmp_path / "storage"), "too-many")).records


@pytest.mark.timeout(1500)
def test_a_population_sweep_runs_as_a_ray_job_with_its_storage_on_s3(
    ray_cluster: RayCluster, s3_root: str, tmp_path: Path
) -> None:
    """Submit four trials with two rungs using `ray job submit`; one child continues from its parent."""
    overrides = {
        "algorithm": "pbt",
        "stopping": "none",
        "space.use": ["recipe"],
        "train.schedule.steps": 12,
        "at_once": 2,
        "storage": f"{s3_root}/storage",
        "name": "population",
    }
    file = tmp_path / "sweep.json"
    file.write_text(with_overrides(a_sweep(tmp_path), overrides).model_dump_json())
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", ray_cluster.dashboard),
        *("--", sys.executable, "-m", "tune_spaces", "--config", str(file), "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert result["trials"] == {"stopped": 1, "succeeded": 4}

    records = Ledger(run_folder(f"{s3_root}/storage", "population")).records
    child = records[4]
    assert child.parent is not None
    parent = records[child.parent]
    assert (child.born, child.inherited) == (1, parent.rungs[0].step)
    assert parent.rungs[0].score == max(record.rungs[0].score for record in records.values() if record.parent is None)
    runs = {run: read_metrics(run_folder(f"{s3_root}/storage", run)) for run in child.runs}
    assert all(line["step"] > child.inherited for lines in runs.values() for line in lines)
    assert all(exists(join(folder, "encoder.safetensors")) for folder in child.encoders)
    assert exists(join(result["report"], "best.json"))
    wait_for(lambda: is_idle(ray_cluster), None)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_sweep_whose_whole_cluster_is_killed_returns_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a sweep without RAY_ADDRESS, so that it starts its own cluster."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    config = with_overrides(a_sweep(tmp_path), {"budget.trials": 2})
    file = tmp_path / "sweep.json"
    file.write_text(config.model_dump_json())
    driver = start(file)
    wait_for(lambda: steps_of(tmp_path, 0) >= 12, driver)
    processes = descendants(driver.pid)
    cluster = [pid for pid, name in processes.items() if name in ("gcs_server", "raylet")]
    assert len(cluster) == 2, processes
    for pid in (driver.pid, *cluster):
        os.kill(pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not any(alive(pid) for pid in processes), None)

    again = start(file)
    _, err = again.communicate(timeout=900)
    assert again.returncode == 0, err
    records = Ledger(run_folder(str(tmp_path / "storage"), "interrupted")).records
    assert records[0].attempts == 2
    found = [(record.point, [rung.score for rung in record.rungs], record.state) for record in records.values()]
    assert found == reference_outcomes(config, str(tmp_path / "reference"))


def descendants(pid: int) -> dict[int, str]:
    """Return the names of all descendant processes, by PID."""
    found: dict[int, str] = {}
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found[child] = Path(f"/proc/{child}/comm").read_text().strip()
            found |= descendants(child)
    return found


def alive(pid: int) -> bool:
    """Return whether a process is running and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
