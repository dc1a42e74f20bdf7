"""Run one trial under Ray Tune: train one run per seed, rung by rung, and report each rung before the next starts.

Ray Train's workers stay alive between rungs and for the next trial in the same process. A restarted trial resumes its
runs from storage: rungs that were already probed are read back rather than retrained.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from amd.config import ScalingConfig, TrainConfig, validate, with_overrides
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.reporting.progress import Event, Watcher
from amd.training.run_folder import RunResult, run_folder
from amd.training.runs.checks import check_data
from amd.training.runs.launch import launch
from tune_spaces.search.worker import TRIAL

STEP_EVENT_INTERVAL_S = 2.0  # minimum interval between step events of a trial

_process = ExitStack()  # keeps Ray Train's workers alive as long as this process
_joined = False


class RungNotReached(Exception):
    """Raised when a run ends before reaching its rung."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.result = result


def run_trial(config: dict[str, Any], coordinator: Any) -> None:
    """Run a task created by `Sweep.task` as a Ray Tune function trainable.

    Reports one dict per rung. If the run itself fails, it reports a dict with `failed` and returns; if a process or
    node is lost, it raises so that Tune restarts the trial.
    """
    from ray import tune

    with _stop_event(coordinator, config["number"]) as stop:
        watcher = _DriverWatcher(config["number"], coordinator)
        _join_cluster(validate(ScalingConfig, config["train"]["scaling"]), watcher)
        for report in run_rungs(config, stop, watcher):
            tune.report(report)


def run_rungs(
    task: dict[str, Any], stop: threading.Event, watcher: Watcher, run: Callable[..., RunResult] = launch
) -> Iterator[dict[str, Any]]:
    """Train a task rung by rung and yield one report per rung until stopped.

    `task`: number, train (config of the first seed), runs (run IDs, one per seed), fractions (rungs), completed_rungs
    (number already reported), parent (run and step to start from), has_children (whether to keep checkpoints at rungs).
    """
    base = validate(TrainConfig, task["train"])
    steps = check_data(base).steps
    ends = [max(1, round(fraction * steps)) for fraction in task["fractions"]]
    inherited = task["parent"][1] if task["parent"] else 0
    try:
        for level in range(task["completed_rungs"], len(ends)):
            pins = ends[max(0, level - 1) : level + 1] if task["has_children"] else []
            pinned = {"checkpoint.pin_steps": [*base.checkpoint.pin_steps, *pins]}
            runs = []
            for seed, run_id in enumerate(task["runs"]):
                config = with_overrides(base, {"seed": base.seed + seed, **pinned})
                launch_run = partial(
                    run, config, TRIAL, run_id=run_id, parent=task["parent"], stop=stop, watcher=watcher
                )
                runs.append(_train_to_rung(config, run_id, ends[level], steps, inherited, launch_run))
            yield {"level": level, "fraction": task["fractions"][level], **_report(ends[level], inherited, runs, base)}
    except RungNotReached as error:
        if error.result.state != "cancelled":
            yield {"failed": error.result.reason or "unknown", "message": error.result.message}


class _RunAtRung:
    """Metrics and encoder of one run at one rung."""

    def __init__(self, result: RunResult | None, folder: str, step: int, inherited: int) -> None:
        lines = [line for line in read_metrics(folder) if line["step"] <= step]
        self.seconds = _seconds(lines, inherited)
        self.figures = _figures(lines, step)
        self.encoder = result.encoder_folder if result else None


def _train_to_rung(
    config: TrainConfig, run_id: str, step: int, steps: int, inherited: int, launch_run: Callable[..., RunResult]
) -> _RunAtRung:
    """Train a run to a step and probe it. Raises RungNotReached if the run ends earlier."""
    assert config.storage is not None, "set by the sweep"
    folder = run_folder(config.storage, run_id)
    if step < steps and _figures(read_metrics(folder), step):
        return _RunAtRung(None, folder, step, inherited)
    result = launch_run(until=step if step < steps else None, wait=True)
    if result.state not in ("succeeded", "paused"):
        raise RungNotReached(result)
    return _RunAtRung(result, folder, step, inherited)


def _figures(lines: list[dict[str, Any]], step: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in lines:
        if line["step"] == step:
            found |= {name: value for name, value in line.items() if name.startswith("eval/")}
    return found


def _seconds(lines: list[dict[str, Any]], before: int) -> float:
    """Return the training time after a step, including waits for data."""
    total = 0.0
    for line in lines:
        if "time/step_s" in line:
            total += line["time/step_s"] * max(0, line["step"] - before)
            before = line["step"]
    return total


def _report(step: int, inherited: int, runs: list[_RunAtRung], config: TrainConfig) -> dict[str, Any]:
    names = sorted(set.intersection(*(set(run.figures) for run in runs)))
    figures = {name: [run.figures[name] for run in runs] for name in names}
    return {
        "step": step,
        "figures": figures,
        "clips": (step - inherited) * config.clips_per_step * len(runs),
        "seconds": sum(run.seconds for run in runs) / len(runs),
        "encoders": [run.encoder for run in runs if run.encoder],
        "time": time.time(),
        **{name: sum(by_seed) / len(by_seed) for name, by_seed in figures.items()},
    }


def _join_cluster(scaling: ScalingConfig, watcher: _DriverWatcher) -> None:
    """Connect to the cluster for all trials in this process, so that Ray Train's workers outlive each trial."""
    global _joined
    from amd.training.ray.ray_train import cluster

    if not _joined:
        _process.enter_context(cluster(scaling, watcher.log))
        _joined = True


@contextlib.contextmanager
def _stop_event(coordinator: Any, number: int) -> Iterator[threading.Event]:
    """Yield an event that is set when the sweep or this trial should stop."""
    from amd.training.ray.ray_train import listen_for_stop

    stop, over = threading.Event(), threading.Event()
    listen_for_stop(coordinator, stop, over, number)
    try:
        yield stop
    finally:
        over.set()


class _DriverWatcher:
    """Watcher that sends events to the sweep's driver."""

    def __init__(self, number: int, coordinator: Any) -> None:
        self._number, self._coordinator = number, coordinator
        self._last_step_event = float("-inf")

    def on_event(self, event: Event) -> None:
        if event["kind"] == "step":
            if time.monotonic() - self._last_step_event < STEP_EVENT_INTERVAL_S:
                return
            self._last_step_event = time.monotonic()
            event = {"kind": "step", "step": event["step"], "speed": event["values"]["speed/samples_per_s"]}
        elif event["kind"] == "start":
            event = {"kind": "start", "step": event["done"], "steps": event["steps"], "pids": event["pids"]}
        self._emit(event)

    def log(self, text: str) -> None:
        self._emit({"kind": "note", "text": text})

    def close(self) -> None:
        pass

    def _emit(self, event: Event) -> None:
        self._coordinator.emit.remote({"trial": self._number, **event})
