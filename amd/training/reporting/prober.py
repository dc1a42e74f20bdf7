"""Probe a run's checkpoints during training, in subprocesses of the driver; training never waits for them.

Starts `python -m amd.downstream probe-checkpoint` for each due checkpoint, one at a time. Failures are logged and never
stop the run. Does not import the probes, which belong to a layer above training.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress

from amd.config import CheckpointConfig, RunProbeConfig
from amd.storage import join
from amd.training.checkpoints.store import CheckpointStore
from amd.training.reporting.progress import Event, Watcher

COMMIT_S = 600.0  # a checkpoint that is not committed by then never will be
POLL_S = 1.0

logger = logging.getLogger(__name__)


class Prober:
    """A watcher that probes checkpoints and forwards all events to another watcher."""

    def __init__(self, watcher: Watcher, run_folder: str, probe: RunProbeConfig) -> None:
        self._watcher, self._folder, self._probe = watcher, run_folder, probe
        self._steps_per_epoch = 0.0
        self._last = 0
        self._due: queue.Queue[int | None] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prober", daemon=True)
        self._thread.start()

    def on_event(self, event: Event) -> None:
        self._watcher.on_event(event)
        if event["kind"] == "start":
            self._steps_per_epoch, self._last = event["steps"] / event["epochs"], event["steps"]
        elif event["kind"] == "checkpoint" and is_probed(
            event["step"], self._last, self._steps_per_epoch, self._probe.every_epochs
        ):
            self._due.put(event["step"])

    def log(self, text: str) -> None:
        self._watcher.log(text)

    def close(self) -> None:
        """Wait for pending probes."""
        self._due.put(None)
        self._thread.join()

    def abandon(self) -> None:
        """Kill the current probe and skip pending ones. Called after a stop request."""
        self._stopped.set()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
        self.close()

    def _work(self) -> None:
        while (step := self._due.get()) is not None:
            if not self._stopped.is_set() and self._committed(step):
                self._run(step)

    def _committed(self, step: int) -> bool:
        store, until = (
            CheckpointStore(join(self._folder, "checkpoints"), CheckpointConfig()),
            time.monotonic() + COMMIT_S,
        )
        while time.monotonic() < until and not self._stopped.is_set():
            with suppress(Exception):  # a storage outage may be temporary
                steps = store.committed()
                if step in steps:
                    return True
                if any(other > step for other in steps):  # it was removed before it could be probed
                    self.log(
                        f"WARNING step {step} was not probed: its checkpoint was removed; raise checkpoint.keep_last"
                    )
                    return False
            self._stopped.wait(POLL_S)
        return False

    def _run(self, step: int) -> None:
        command = [
            sys.executable,
            "-m",
            "amd.downstream",
            "probe-checkpoint",
            "--run",
            self._folder,
            "--step",
            str(step),
        ]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=_lower_priority,
        )
        printed, errors = self._process.communicate()
        if self._process.returncode == 0:
            metrics = json.loads(printed.strip().splitlines()[-1])
            shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items() if "/" in name)
            self.log(f"probe of step {step}: {shown}")
        elif not self._stopped.is_set():
            self.log(f"WARNING the probe of step {step} failed: {(errors.strip().splitlines() or ['no reason'])[-1]}")


def is_probed(step: int, steps: int, steps_per_epoch: float, every_epochs: int) -> bool:
    """Return whether the encoder is probed after this step: every `every_epochs` epochs and at the end of the run."""
    return step == steps or (steps_per_epoch > 0 and step % _interval(steps_per_epoch, every_epochs) == 0)


def probed_steps(steps: int, steps_per_epoch: float, every_epochs: int) -> set[int]:
    """Return all steps of a run after which the encoder is probed."""
    interval = _interval(steps_per_epoch, every_epochs)
    return {*range(interval, steps + 1, interval), steps}


def _interval(steps_per_epoch: float, every_epochs: int) -> int:
    return max(1, round(steps_per_epoch * every_epochs))


def _lower_priority() -> None:
    os.nice(10)  # a probe must not slow down training on the same machine
