"""Probes of a run on the way: a process of its own for each, beside the driver; the training waits for none of them.

Listens for checkpoints as a watcher does and starts `python -m amd.downstream probe-checkpoint`, one at a time. What
goes wrong there is told and never ends the run. Knows nothing of probes: training stands below them.
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

COMMIT_S = 600.0  # a checkpoint that is not committed by then will not be
POLL_S = 1.0

logger = logging.getLogger(__name__)


class Prober:
    """A watcher around another one."""

    def __init__(self, watching: Watcher, run_folder: str, probe: RunProbeConfig) -> None:
        self._watching, self._folder, self._probe = watching, run_folder, probe
        self._steps_per_epoch = 0.0
        self._last = 0
        self._due: queue.Queue[int | None] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prober", daemon=True)
        self._thread.start()

    def see(self, event: Event) -> None:
        self._watching.see(event)
        if event["kind"] == "start":
            self._steps_per_epoch, self._last = event["steps"] / event["epochs"], event["steps"]
        elif event["kind"] == "checkpoint" and is_probed(
            event["step"], self._last, self._steps_per_epoch, self._probe.every_epochs
        ):
            self._due.put(event["step"])

    def say(self, text: str) -> None:
        self._watching.say(text)

    def close(self) -> None:
        """Wait for the probes that are due."""
        self._due.put(None)
        self._thread.join()

    def abandon(self) -> None:
        """The run was stopped: end the probe that runs, start no other."""
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
            with suppress(Exception):  # storage that does not answer now may do so later
                steps = store.committed()
                if step in steps:
                    return True
                if any(other > step for other in steps):  # it was removed before its turn came
                    self.say(
                        f"WARNING step {step} was not probed: its checkpoint is gone; keep more (checkpoint.keep_last)"
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
            preexec_fn=_politely,
        )
        printed, complaint = self._process.communicate()
        if self._process.returncode == 0:
            figures = json.loads(printed.strip().splitlines()[-1])
            shown = "  ".join(f"{name} {value:.2f}" for name, value in figures.items() if "/" in name)
            self.say(f"probe of step {step}: {shown}")
        elif not self._stopped.is_set():
            self.say(
                f"WARNING the probe of step {step} failed: {(complaint.strip().splitlines() or ['no reason'])[-1]}"
            )


def is_probed(step: int, steps: int, steps_per_epoch: float, every_epochs: int) -> bool:
    """Whether the encoder is probed after this step: at the end of every so many epochs, and of the run."""
    return step == steps or (steps_per_epoch > 0 and step % max(1, round(steps_per_epoch * every_epochs)) == 0)


def _politely() -> None:
    os.nice(10)  # a probe on the training's own machine takes what is left
