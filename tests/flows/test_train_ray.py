"""Tests that training on Ray Train and S3 survives killed ranks, SIGTERM, resubmission, and lost and added nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TypeVar

import fsspec
import pytest

from amd.config import TrainConfig, with_overrides
from amd.storage import join, listdir
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.reporting.progress import Event, NullWatcher
from amd.training.run_folder import RunResult, run_folder
from amd.training.runs.launch import train
from tests.support.processes import run_in_subprocess
from tests.support.ray_cluster import RayCluster, second_node
from tests.support.runs.tiny_runs import assert_same_bits, final_state, tiny_run, train_in_processes

pytestmark = pytest.mark.ray
STEPS = 120  # enough that a stop, which takes a second or two, arrives before the end


def two_workers(folder: Path, name: str) -> TrainConfig:
    return tiny_run(
        folder,
        name=name,
        schedule__steps=STEPS,
        scaling__workers=2,
        scaling__micro_batch=2,
        checkpoint__every_steps=10,
        tracking__log_every_steps=2,
    )


W = TypeVar("W", bound=NullWatcher)


def train_with_watcher(config: TrainConfig, watcher: W) -> tuple[RunResult, W]:
    """Run training and return its result and the watcher."""
    return train(config, watcher=watcher), watcher


class FaultInjector(NullWatcher):
    """Kills rank 1 after step 12, and stops the run after step 25 once it has recovered."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.messages: list[str] = []
        self.pids: list[int] = []
        self.faults = 0

    def on_event(self, event: Event) -> None:
        if event["kind"] == "start":
            self.starts.append(event["done"])
            self.pids = event["pids"]
        if event["kind"] == "step" and event["step"] >= 12 and self.faults == 0:
            self.faults = 1
            os.kill(self.pids[1], signal.SIGKILL)
        if event["kind"] == "step" and event["step"] >= 25 and self.faults == 1 and len(self.starts) == 2:
            self.faults = 2
            os.kill(os.getpid(), signal.SIGTERM)

    def log(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.timeout(1500)  # three starts of Ray Train: minutes on a busy machine
def test_a_run_that_is_killed_stopped_and_resubmitted_trains_identical_weights(
    ray_cluster: RayCluster, s3_root: str, tmp_path: Path
) -> None:
    reference = two_workers(tmp_path, "reference")
    reference_folder = train_in_processes(reference, world=2)

    fs = fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    for name in ("images", "teacher.safetensors"):
        fs.put(str(tmp_path / name), f"{s3_root}/{name}", recursive=True)
    remote = {"data.train": f"{s3_root}/images", "teacher.weights": f"{s3_root}/teacher.safetensors"}
    config = with_overrides(reference, {"name": "main", "storage": f"{s3_root}/storage", **remote})
    stopped, injector = run_in_subprocess(train_with_watcher, config, FaultInjector())
    assert (stopped.state, stopped.reason) == ("cancelled", "cancelled_by_user"), stopped.message
    assert injector.faults == 2
    assert [step % 10 for step in injector.starts] == [0, 0], "a run must continue from a checkpoint"
    assert injector.starts[1] > 0
    assert any("infrastructure failure 1 of 3" in text for text in injector.messages)
    checkpoints = join(stopped.run_folder, "checkpoints")
    assert 25 <= stopped.steps < STEPS
    assert listdir(checkpoints)[-1] == f"step-{stopped.steps:08d}"

    fs.pipe_file(f"{s3_root}/config.json", config.model_dump_json().encode())
    result = submit(ray_cluster, ["--config", f"{s3_root}/config.json", "scaling.workers=[1,2]", "--json"])
    assert (result.state, result.steps) == ("succeeded", STEPS), result.message
    assert_same_bits(final_state(result.run_folder, config), final_state(reference_folder, reference))
    assert listdir(checkpoints) == [f"step-{STEPS - 10:08d}", f"step-{STEPS:08d}"]
    assert [line["step"] for line in read_metrics(result.run_folder)][-1] == STEPS

    # Two workers learn the same weights as a single process, up to rounding.
    alone = with_overrides(reference, {"name": "alone", "scaling.workers": 1})
    single = final_state(train(alone, local=True, quiet=True).run_folder, alone)
    many = final_state(reference_folder, reference)
    worst = max(float((many[name] - single[name]).abs().max()) for name in many if name.startswith("model/"))
    assert worst < 1e-4


def submit(cluster: RayCluster, args: list[str]) -> RunResult:
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.dashboard),
        *("--runtime-env-json", json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}})),
        *("--", sys.executable, "-m", "amd.training", *args),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout + done.stderr
    return RunResult.model_validate_json(printed[-1])


class NodeReclaimer(NullWatcher):
    """Preempts a node once two workers are training, and stops the run once it has resumed with one worker."""

    def __init__(self, node: int) -> None:
        self._node = node  # pid
        self._deadline = time.monotonic() + 400
        self.starts: list[Event] = []
        self.reclaimed: int | None = None  # index of the start that was ended by the preemption
        self.saved: list[int] = []
        self.messages: list[str] = []

    def on_event(self, event: Event) -> None:
        if event["kind"] == "start":
            self.starts.append(event)
        elif event["kind"] == "checkpoint":
            self.saved.append(event["step"])
        elif event["kind"] == "warning":
            self.messages.append(event["text"])
        elif event["kind"] == "step":
            if self.reclaimed is None and self.starts[-1]["workers"] == 2:  # it may have started with one
                self.reclaimed = len(self.starts) - 1
                os.kill(self._node, signal.SIGTERM)  # Ray notifies the workers, and ends them NOTICE_S later
            elif self.reclaimed is not None and self.starts[-1]["workers"] == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # a start before the node is removed would be lost with it
            elif time.monotonic() > self._deadline:
                os.kill(os.getpid(), signal.SIGTERM)

    def log(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_preempted_node_loses_no_work_and_the_run_continues_with_fewer_workers(
    ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At three CPUs each, one worker fits on the head with four, and the other needs the second node.
    shape = {"scaling.workers": [1, 2], "scaling.cpus_per_worker": 3, "checkpoint.every_steps": None}
    limits = {"schedule.steps": 100_000, "checkpoint.deadline_s": 300}
    config = with_overrides(two_workers(tmp_path, "spot"), {**shape, **limits})
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    with second_node(ray_cluster, cpus=3, mark="spot") as node:
        result, reclaimer = run_in_subprocess(train_with_watcher, config, NodeReclaimer(node.pid))
    assert (result.state, result.reason) == ("cancelled", "cancelled_by_user"), result.message
    assert reclaimer.reclaimed is not None, "the run never had two workers"
    before, after = reclaimer.starts[reclaimer.reclaimed], reclaimer.starts[-1]
    *saved, last = reclaimer.saved  # at each resize, at every poll after the preemption notice, and at the stop
    warning = "a node is about to be preempted"
    noticed = next(step for step in saved if any(f"step {step}: {warning}" in text for text in reclaimer.messages))
    assert saved.index(noticed) == reclaimer.reclaimed, "every earlier start has ended with a resize"
    assert any("preemption failure 1 of 10" in text for text in reclaimer.messages)
    assert (before["workers"], after["workers"], after["workers_before"]) == (2, 1, 2)
    assert noticed <= after["done"] == saved[-1]
    assert (after["batch"], after["lr"]) == (before["batch"], before["lr"])
    assert (before["micro_batches"], after["micro_batches"]) == (2, 4)
    assert result.steps == last > saved[-1]


class RankFreezer(NullWatcher):
    """Suspends rank 1 after step 12, as a hung file system would."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.pids: list[int] = []
        self.frozen = False

    def on_event(self, event: Event) -> None:
        if event["kind"] == "start":
            self.pids = event["pids"]
        if event["kind"] == "step" and event["step"] >= 12 and not self.frozen:
            self.frozen = True
            os.kill(self.pids[1], signal.SIGSTOP)

    def log(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_run_with_a_hung_rank_is_reported_and_continues(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """The suspended rank cannot report the hang, so the rank that waits for it must do so."""
    config = with_overrides(two_workers(tmp_path, "hung"), {"scaling.stall_timeout_s": 60})
    result, freezer = run_in_subprocess(train_with_watcher, config, RankFreezer())
    assert (result.state, result.steps, result.restarts) == ("succeeded", STEPS, {"stalled": 1}), result.message
    (report,) = (text for text in freezer.messages if "stack traces:" in text)
    assert report.startswith("rank 0 has made no progress for scaling.stall_timeout_s=60 s after step ")
    assert "amd/training/trainer/loop.py" in report
    assert any("infrastructure failure 1 of 3" in text for text in freezer.messages)
    (error,) = listdir(join(result.run_folder, "errors"))
    assert "amd/training/trainer/loop.py" in fsspec.open(join(result.run_folder, "errors", error), "rt").open().read()
    assert {*listdir(join(result.run_folder, "logs"))} == {"rank-00000", "rank-00001"}


class GrowthObserver(NullWatcher):
    """Stops the run a few steps after it has resumed with two workers."""

    def __init__(self, steps: int = 20) -> None:
        self._steps = steps
        self._deadline = time.monotonic() + 400
        self.starts: list[Event] = []
        self.logged: list[int] = []  # steps before the last start
        self.saved: list[int] = []

    def on_event(self, event: Event) -> None:
        if event["kind"] == "start":
            self.starts.append(event)
        elif event["kind"] == "checkpoint":
            self.saved.append(event["step"])
        elif event["kind"] == "step":
            grown = self.starts[-1]["workers"] == 2
            if not grown:
                self.logged.append(event["step"])
            if (grown and event["step"] >= self.starts[-1]["done"] + self._steps) or time.monotonic() > self._deadline:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_run_grows_onto_a_new_node_without_losing_a_step(ray_cluster: RayCluster, tmp_path: Path) -> None:
    shape = {"scaling.workers": [1, 2], "scaling.cpus_per_worker": 3, "scaling.resize_interval_s": 5}
    limits = {"schedule.steps": 100_000, "checkpoint.every_steps": None, "checkpoint.deadline_s": 120}
    config = with_overrides(two_workers(tmp_path, "grown"), {**shape, **limits, "tracking.log_every_steps": 1})
    folder = run_folder(str(config.storage), "grown")
    added = threading.Event()

    def add_node() -> None:
        while not read_metrics(folder):
            time.sleep(0.2)
        with second_node(ray_cluster, cpus=3, mark="added"):
            added.wait()

    thread = threading.Thread(target=add_node)
    thread.start()
    try:
        result, observer = run_in_subprocess(train_with_watcher, config, GrowthObserver())
    finally:
        added.set()
        thread.join()
    assert (result.state, result.reason, result.restarts) == ("cancelled", "cancelled_by_user", {}), result.message
    before, after = observer.starts
    assert (before["workers"], after["workers"], after["workers_before"]) == (1, 2, 1)
    assert after["done"] == observer.saved[0] == observer.logged[-1], "a step was lost or repeated"
    assert (before["micro_batches"], after["micro_batches"]) == (4, 2)


def test_workers_that_do_not_fit_are_reported_with_the_cluster_resources(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    overrides = {"scaling.cpus_per_worker": 64, "scaling.start_timeout_s": 1}
    result, _ = run_in_subprocess(
        train_with_watcher, with_overrides(two_workers(tmp_path, "large"), overrides), NullWatcher()
    )
    assert (result.state, result.reason, result.exit_code) == ("failed", "infeasible_resources", 1)
    assert "scaling.workers=2: each worker needs 64 CPU; the cluster has 4 CPU" in result.message
    assert len(listdir(join(result.run_folder, "errors"))) == 1, "a permanent error must not be retried"
