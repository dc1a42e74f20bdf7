"""Show a run's progress as a bar on a terminal, as log lines, and in the JSON file named by AMD_PROGRESS_FILE.

Consumes rank 0's events; does not depend on how they are transported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

Event = dict[str, Any]  # {"kind": "teacher" | "start" | "step" | "checkpoint" | "warning", …}, to cross processes

PROGRESS_FILE = "AMD_PROGRESS_FILE"
MIN_PACE_S = 5.0  # the first seconds are slower or faster than the rest, e.g. while other ranks and jobs start


class Watcher(Protocol):
    def on_event(self, event: Event) -> None: ...
    def log(self, text: str) -> None: ...
    def close(self) -> None: ...


class NullWatcher:
    """Ignores all events."""

    def on_event(self, event: Event) -> None:
        pass

    def log(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class LineWatcher:
    """Writes plain lines for logs and pipes: at most one per second, plus the last one."""

    def __init__(self, out: TextIO, seconds: float = 1.0) -> None:
        self._out, self._seconds = out, seconds
        self._pace = PaceEstimator()
        self._printed = float("-inf")

    def on_event(self, event: Event) -> None:
        self._pace.on_event(event)
        if event["kind"] == "start":
            self.log("\n".join(describe_start(event)))
        elif event["kind"] == "warning":
            self.log(f"WARNING {event['text']}")
        elif event["kind"] == "note":
            self.log(event["text"])
        elif event["kind"] == "step":
            last = event["step"] == self._pace.steps
            if last or time.monotonic() - self._printed >= self._seconds:
                self._printed = time.monotonic()
                self.log(self._pace.line(event))

    def log(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        pass


class ProgressBarWatcher:
    """Shows a live bar with time left, speed, and the fraction of time spent waiting for data."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._pace = PaceEstimator()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task: TaskID | None = None

    def on_event(self, event: Event) -> None:
        self._pace.on_event(event)
        if event["kind"] == "start":
            self.log("\n".join(describe_start(event)))
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(
                event["run_id"], total=event["steps"], completed=event["done"], note=""
            )
            self._progress.start()
        elif event["kind"] == "warning":
            self._progress.console.print(event["text"], style="yellow", highlight=False)
        elif event["kind"] == "note":
            self.log(event["text"])
        elif event["kind"] == "step" and self._task is not None:
            self._progress.update(self._task, completed=event["step"], note=_note(event["values"]))

    def log(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


class PaceEstimator:
    """Estimates the time left from the pace of the steps completed so far."""

    def __init__(self) -> None:
        self.steps = 0
        self._first: tuple[float, int] | None = None

    def on_event(self, event: Event) -> None:
        if event["kind"] == "start":
            self.steps, self._first = event["steps"], None
        elif event["kind"] == "step" and self._first is None:
            self._first = time.monotonic(), event["step"]

    def line(self, event: Event) -> str:
        text = f"step {event['step']}/{self.steps}  {_note(event['values'])}"
        left = self.seconds_left(event["step"])
        return text if left is None else f"{text}  {duration(left)} left"

    def seconds_left(self, step: int) -> float | None:
        """Return the estimated seconds left; None within MIN_PACE_S of the first logged step, and at the end."""
        if self._first is None or step <= self._first[1] or step >= self.steps:
            return None
        since, first = self._first
        elapsed = time.monotonic() - since
        return elapsed / (step - first) * (self.steps - step) if elapsed >= MIN_PACE_S else None


class ProgressFileWatcher:
    """Forwards events, and writes progress to a file at most once per second."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._pace = PaceEstimator()
        self._run_id = ""
        self._teacher: dict[str, Any] | None = None
        self._written = float("-inf")

    def on_event(self, event: Event) -> None:
        self._watcher.on_event(event)
        self._pace.on_event(event)
        if event["kind"] == "teacher":
            self._teacher = event["training"]
        elif event["kind"] == "start":
            self._run_id = event["run_id"]
            self._note(event["done"], None)
        elif event["kind"] == "step" and (event["step"] == self._pace.steps or time.monotonic() >= self._written + 1):
            self._note(event["step"], event["values"]["speed/samples_per_s"])

    def log(self, text: str) -> None:
        self._watcher.log(text)

    def close(self) -> None:
        self._watcher.close()

    def _note(self, step: int, speed: float | None) -> None:
        self._written = time.monotonic()
        progress = {"run": self._run_id, "step": step, "steps": self._pace.steps, "samples_per_s": speed}
        progress["trained_teacher"] = self._teacher
        write_progress({**progress, "seconds_left": self._pace.seconds_left(step)})


def write_progress(progress: dict[str, Any]) -> None:
    """Replace the progress file, if AMD_PROGRESS_FILE is set."""
    file = os.environ.get(PROGRESS_FILE)
    if file:
        temporary = Path(f"{file}.new")
        temporary.write_text(json.dumps(progress))
        temporary.replace(file)


def _note(values: dict[str, float]) -> str:
    waiting = values["time/data_s"] / values["time/step_s"] if values["time/step_s"] else 0.0
    return (
        f"loss {values['loss/total']:.4f}  lr {values['optim/lr']:.2e}  {values['speed/samples_per_s']:.1f} clips/s  "
        f"waiting for data {waiting:.0%}"
    )


def describe_start(event: Event) -> list[str]:
    """Summarise a run before its first step."""
    parameters = ", ".join(f"{name} {_millions(size)}" for name, size in event["parameters"].items())
    visible = ", ".join(f"{name} {tokens}" for name, tokens in event.get("visible_tokens", {}).items())
    clips = f" of {event['clips']} clips" if event["clips"] != event["batch"] else ""
    workers = f"{event['workers']} worker{'s' if event['workers'] > 1 else ''}"
    parts = event["micro_batches"]
    lines = [
        f"run        {event['run_id']}" + (f", continued after step {event['done']}" if event["done"] else ""),
        f"length     {event['steps']} steps, {event['epochs']:.1f} epochs of {event['samples']} samples",
        f"batch      {event['batch']} samples{clips}: {workers} on {event['device']}, "
        f"{parts} micro-batch{'es' if parts > 1 else ''} each, {event['precision']}",
        f"peak lr    {event['lr']:.3g}",
        f"parameters {parameters}",
        f"tokens     {event['clip_tokens']} a clip{f'; visible to {visible}' if visible else ''}; "
        f"{event['gflops_per_clip']:.3g} GFLOP a clip",
    ]
    if event["workers_before"] != event["workers"]:
        lines.append(
            f"elastic    {workers} instead of {event['workers_before']}: batch and learning rate are "
            "kept, micro-batches are recomputed"
        )
    if event["done"] < event["steps"]:
        lines.append(f"estimate   {duration(event['seconds'])}, waiting for data not counted")
    return lines


def duration(seconds: float) -> str:
    """Format a duration, for example 42 s, 7 min, 3 h 20 min or 2 d 4 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def choose_watcher(quiet: bool = False) -> Watcher:
    """Return a watcher that shows a progress bar on a terminal and writes plain lines otherwise.

    Both write to standard error, leaving standard output for results.
    """
    shown = NullWatcher() if quiet else _visible_watcher()
    return ProgressFileWatcher(shown) if PROGRESS_FILE in os.environ else shown


def _visible_watcher() -> Watcher:
    try:
        from rich.console import Console  # not imported above: training works without rich
    except ModuleNotFoundError:
        return LineWatcher(sys.stderr)
    console = Console(stderr=True)
    return ProgressBarWatcher(console) if console.is_terminal else LineWatcher(sys.stderr)
