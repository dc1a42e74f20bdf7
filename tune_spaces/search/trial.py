"""One trial, as Tune runs it: the runs of its seeds, rung by rung, each rung told before the next is begun.

Between rungs the workers of Ray Train stay and wait, also for the next trial in the same process. A trial that is
begun again finds its runs where they were: whatever they have been probed for is read, not trained again.
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
from amd.training.reporting.metrics import read_metrics
from amd.training.reporting.progress import Event, Watcher
from amd.training.run_folder import RunResult, run_folder
from amd.training.runs.checks import check_data
from amd.training.runs.launch import launch
from tune_spaces.search.worker import TRIAL

TELL_S = 2.0  # at most so often does a trial tell of its steps

_process = ExitStack()  # Ray Train's workers, kept as long as this process lives
_joined = False


class RunEnded(Exception):
    """A run that did not come to its rung."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.result = result


def run_trial(config: dict[str, Any], board: Any) -> None:
    """Tune's function trainable, for a task of `Sweep.task`.

    Reports a dict for each rung; after a failure of the run's own making one with `failed`, then it ends. What was lost
    on the way (a process, a node) it raises, and Tune begins it again.
    """
    from ray import tune

    with _listening(board) as stop:
        watching = _Telling(config["number"], board)
        _join(validate(ScalingConfig, config["train"]["scaling"]), watching)
        for report in reports(config, stop, watching):
            tune.report(report)


def reports(
    task: dict[str, Any], stop: threading.Event, watching: Watcher, run: Callable[..., RunResult] = launch
) -> Iterator[dict[str, Any]]:
    """What becomes of a task, rung by rung, each told before the next is begun; nothing more once it was stopped.

    `task`: number, train (the config of its first seed), runs (ids, by seed), fractions (rungs), told (how many of them
    are known already), parent (run and step that it begins from), has_children (keep what they begin from).
    """
    base = validate(TrainConfig, task["train"])
    steps = check_data(base).steps
    ends = [max(1, round(fraction * steps)) for fraction in task["fractions"]]
    inherited = task["parent"][1] if task["parent"] else 0
    try:
        for level in range(task["told"], len(ends)):
            pins = ends[max(0, level - 1) : level + 1] if task["has_children"] else []
            kept = {"checkpoint.pin_steps": [*base.checkpoint.pin_steps, *pins]}
            runs = []
            for seed, run_id in enumerate(task["runs"]):
                config = with_overrides(base, {"seed": base.seed + seed, **kept})
                go = partial(run, config, TRIAL, run_id=run_id, parent=task["parent"], stop=stop, watching=watching)
                runs.append(_to_rung(config, run_id, ends[level], steps, inherited, go))
            yield {"level": level, "fraction": task["fractions"][level], **_report(ends[level], inherited, runs, base)}
    except RunEnded as ended:
        if ended.result.state != "cancelled":
            yield {"failed": ended.result.reason or "unknown", "message": ended.result.message}


class _Run:
    """A run at a rung."""

    def __init__(self, result: RunResult | None, folder: str, step: int, inherited: int) -> None:
        lines = [line for line in read_metrics(folder) if line["step"] <= step]
        self.seconds = _seconds(lines, inherited)
        self.figures = _figures(lines, step)
        self.encoder = result.encoder_folder if result else None


def _to_rung(
    config: TrainConfig, run_id: str, step: int, steps: int, inherited: int, go: Callable[..., RunResult]
) -> _Run:
    """Bring a run to a step and probe it. Raises RunEnded where it does not come there."""
    assert config.storage is not None, "the sweep has told where"
    folder = run_folder(config.storage, run_id)
    if step < steps and _figures(read_metrics(folder), step):
        return _Run(None, folder, step, inherited)
    result = go(until=step if step < steps else None, wait=True)
    if result.state not in ("succeeded", "paused"):
        raise RunEnded(result)
    return _Run(result, folder, step, inherited)


def _figures(lines: list[dict[str, Any]], step: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in lines:
        if line["step"] == step:
            found |= {name: value for name, value in line.items() if name.startswith("eval/")}
    return found


def _seconds(lines: list[dict[str, Any]], before: int) -> float:
    """Of training after a step: what the steps took, their waiting for data included."""
    total = 0.0
    for line in lines:
        if "time/step_s" in line:
            total += line["time/step_s"] * max(0, line["step"] - before)
            before = line["step"]
    return total


def _report(step: int, inherited: int, runs: list[_Run], config: TrainConfig) -> dict[str, Any]:
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


def _join(scaling: ScalingConfig, watching: _Telling) -> None:
    """Hold the cluster for all trials of this process, so that Ray Train's workers outlast each of them."""
    global _joined
    from amd.training.ray.ray_train import cluster

    if not _joined:
        _process.enter_context(cluster(scaling, watching.say))
        _joined = True


@contextlib.contextmanager
def _listening(board: Any) -> Iterator[threading.Event]:
    """An event that is set when the sweep is to stop."""
    from amd.training.ray.ray_train import listen_for_stop

    stop, over = threading.Event(), threading.Event()
    listen_for_stop(board, stop, over)
    try:
        yield stop
    finally:
        over.set()


class _Telling:
    """A watcher whose events go to the sweep's driver."""

    def __init__(self, number: int, board: Any) -> None:
        self._number, self._board = number, board
        self._told = float("-inf")

    def see(self, event: Event) -> None:
        if event["kind"] == "step":
            if time.monotonic() - self._told < TELL_S:
                return
            self._told = time.monotonic()
            event = {"kind": "step", "step": event["step"], "speed": event["values"]["speed/samples_per_s"]}
        elif event["kind"] == "start":
            event = {"kind": "start", "step": event["done"], "steps": event["steps"], "pids": event["pids"]}
        self._tell(event)

    def say(self, text: str) -> None:
        self._tell({"kind": "note", "text": text})

    def close(self) -> None:
        pass

    def _tell(self, event: Event) -> None:
        self._board.tell.remote({"trial": self._number, **event})
