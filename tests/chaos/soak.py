"""Train one elastic run on S3 for an hour while nodes come and go, ranks die or hang, and S3 fails.

Run as `python tests/chaos/soak.py --minutes 60 --seed 0`. A local Ray cluster trains a run of one or two workers, whose
data and storage are on an S3 server (moto) behind a proxy. Faults follow one another in an order determined by the
seed; each waits until the run has recovered and committed a checkpoint since the previous one. When a node joins, Ray
Train announces the resize, and the run may repeat at most one step. Before a node is preempted, the run must save a
checkpoint; it keeps training and saving until the node is gone. After any fault, it must continue from the newest
checkpoint. At the end, the run is stopped, and its metrics must contain every step. Prints a table of faults with the
number of repeated steps; the exit code is 1 if a check fails. Stops everything that it started, and removes its folder
unless a check fails or --keep is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple, TextIO, get_args

sys.path.insert(0, str(Path(__file__).parents[2]))

import boto3
import fsspec
import psutil

from amd.config import TrainConfig, with_overrides
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.reporting.progress import Event, NullWatcher
from amd.training.run_folder import RunResult
from amd.training.runs.launch import train
from tests.chaos.campaign import Violation, say, write_pictures
from tests.support.chaos.stack import environment
from tests.support.processes import run_in_subprocess
from tests.support.ray_cluster import RAY_SETTINGS, end_head, second_node, start_head
from tests.support.runs.tiny_runs import tiny_run, tiny_teacher
from tests.support.s3 import S3Server
from tests.support.servers.outages import StallingProxy

FaultKind = Literal["add_node", "preempt_node", "kill_node", "kill_rank", "freeze_rank", "stop_s3", "stall_s3"]
FAULTS: tuple[FaultKind, ...] = get_args(FaultKind)
NEEDS_SECOND_NODE: frozenset[FaultKind] = frozenset({"preempt_node", "kill_node", "freeze_rank"})
RECOVERY_S = 900.0  # without a newer checkpoint for this long, the soak fails
OUTAGE_S = (3.0, 25.0)  # shorter than STALL_S, so that an outage is not reported as a hang
STALL_S = 60.0
BUCKET = "soak"


class Progress:
    """The starts, steps and checkpoints reported by the driver's watcher, in order."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.events: list[Event] = []
        self.starts: list[int] = []  # indices of start events
        self.saved = 0  # step of the newest checkpoint

    def read(self) -> None:
        """Read the lines that have been written since the last call."""
        with suppress(FileNotFoundError), self._path.open() as file:
            file.seek(self._offset)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break  # still being written
                self._offset += len(line.encode())
                event: Event = json.loads(line)
                if event["kind"] == "start":
                    self.starts.append(len(self.events))
                elif event["kind"] == "checkpoint":
                    self.saved = max(self.saved, event["step"])
                self.events.append(event)

    @property
    def start(self) -> Event | None:
        return self.events[self.starts[-1]] if self.starts else None

    @property
    def workers(self) -> int:
        return self.start["workers"] if self.start else 0

    def newest(self, kind: str, before: int, since: int = 0) -> int:
        """Return the highest step among events of one kind in a range of indices, or 0 if there are none."""
        return max((event["step"] for event in self.events[since:before] if event["kind"] == kind), default=0)


class EventWriter(NullWatcher):
    """Appends a run's events to a file, preceded by the driver's PID."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def on_event(self, event: Event) -> None:
        if self._file is None:  # opened here, because the watcher is pickled to the driver
            self._file = self._path.open("a")
            self._write({"kind": "driver", "pid": os.getpid()})
        if event["kind"] in ("start", "step", "checkpoint"):
            self._write({name: event[name] for name in _FIELDS if name in event})

    def _write(self, event: Event) -> None:
        assert self._file is not None
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


_FIELDS = ("kind", "step", "done", "workers", "pids")


class Fault(NamedTuple):
    """A fault that was carried out, and its cost."""

    kind: FaultKind
    at_s: float
    recovered_after_s: float
    starts: int
    repeated_steps: int


class Soak:
    """A run under test, its cluster and storage, and the observed faults and violations."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.progress = Progress(folder / "events.jsonl")
        self.faults: list[Fault] = []
        self.violations: list[str] = []
        self.result: RunResult | None = None
        self.error: BaseException | None = None
        self.node = ExitStack()
        self.node_pid: int | None = None
        self.began = time.monotonic()

    def run(self, minutes: float) -> None:
        server = S3Server()
        with StallingProxy(server.port) as proxy, environment(**_environment(f"http://127.0.0.1:{proxy.port}")):
            self.server, self.proxy = server, proxy
            self.config = self._upload(server.url)
            self.cluster, head, head_folder = start_head(dict(os.environ))
            try:
                with environment(**RAY_SETTINGS, RAY_ADDRESS=self.cluster.address):
                    self._train_with_faults(minutes)
            finally:
                self.node.close()
                end_head(head, head_folder)
                server.stop()

    def _upload(self, endpoint: str) -> TrainConfig:
        """Write the data and the teacher to S3, and return the run's config."""
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        images, weights = self.folder / "images", self.folder / "teacher.safetensors"
        write_pictures(images)
        tiny_teacher(weights)
        s3 = fsspec.filesystem("s3")
        s3.put(str(images), f"s3://{BUCKET}/images", recursive=True)
        s3.put(str(weights), f"s3://{BUCKET}/teacher.safetensors")
        config = tiny_run(self.folder, schedule__steps=10_000_000, schedule__warmup_steps=10, name="soak")
        return with_overrides(
            config,
            {
                "data.train": f"s3://{BUCKET}/images",
                "teacher.weights": f"s3://{BUCKET}/teacher.safetensors",
                "storage": f"s3://{BUCKET}/storage",
                # At three CPUs each, one worker fits on the head with four, and the other needs the second node.
                "scaling.workers": [1, 2],
                "scaling.cpus_per_worker": 3,
                "scaling.micro_batch": 2,
                "scaling.resize_interval_s": 10,
                "scaling.stall_timeout_s": STALL_S,
                "checkpoint.every_steps": None,
                "checkpoint.every_minutes": 0.25,
                "checkpoint.deadline_s": 120,
                "tracking.log_every_steps": 1,
            },
        )

    # Faults

    def _train_with_faults(self, minutes: float) -> None:
        driver = threading.Thread(target=self._drive)
        driver.start()
        try:
            self._await("the start", lambda: self.progress.saved > 0)
            say(f"the run has started; its folder is {self.folder}")
            until = time.monotonic() + 60 * minutes
            while time.monotonic() < until:
                time.sleep(self.random.uniform(0, 15))
                self._carry_out(self._choose())
        except Violation as violation:
            self.violations.append(str(violation))
        finally:
            self._stop(driver)
        self._check_end()

    def _drive(self) -> None:
        try:
            self.result = run_in_subprocess(_train, self.config, EventWriter(self.folder / "events.jsonl"))
        except BaseException as error:
            self.error = error

    def _choose(self) -> FaultKind:
        """Return a random choice of the currently possible faults that have occurred least often."""
        possible = [kind for kind in FAULTS if (kind != "add_node" if self.node_pid else kind not in NEEDS_SECOND_NODE)]
        counts = {kind: sum(fault.kind == kind for fault in self.faults) for kind in possible}
        return self.random.choice([kind for kind in possible if counts[kind] == min(counts.values())])

    def _carry_out(self, kind: FaultKind) -> None:
        self.progress.read()
        starts, saved, at = len(self.progress.starts), self.progress.saved, time.monotonic()
        self._inject(kind)
        needs_start = kind not in ("stop_s3", "stall_s3")

        def recovered() -> bool:
            restarted = len(self.progress.starts) > starts or not needs_start
            return restarted and self.progress.saved > saved and self.progress.workers == (2 if self.node_pid else 1)

        self._await(kind, recovered)
        repeated = self._check_starts(kind, starts, saved)
        self.faults.append(
            Fault(kind, at - self.began, time.monotonic() - at, len(self.progress.starts) - starts, repeated)
        )
        say(f"{kind}: {repeated} steps repeated; checkpoint {self.progress.saved}")

    def _inject(self, kind: FaultKind) -> None:
        pids = self.progress.start["pids"] if self.progress.start else []
        if kind == "add_node":
            self.node_pid = self.node.enter_context(second_node(self.cluster, cpus=3, mark="spot")).pid
        elif kind == "preempt_node":
            self._remove_node(lambda pid: os.kill(pid, signal.SIGTERM))
        elif kind == "kill_node":
            self._remove_node(_kill_tree)
        elif kind == "kill_rank":
            os.kill(self.random.choice(pids), signal.SIGKILL)
        elif kind == "freeze_rank":
            os.kill(pids[-1], signal.SIGSTOP)
        elif kind == "stop_s3":
            self.server.stop()
            time.sleep(self.random.uniform(*OUTAGE_S))
            self.server.start()
        else:
            with self.proxy.outage():
                time.sleep(self.random.uniform(*OUTAGE_S))

    def _remove_node(self, end: Callable[[int], None]) -> None:
        assert self.node_pid is not None
        end(self.node_pid)
        self.node_pid = None
        threading.Thread(target=self.node.pop_all().close).start()  # waits until the node has exited

    def _await(self, what: str, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + RECOVERY_S
        while not condition():
            if self.result is not None or self.error is not None:
                raise Violation(f"the run ended after {what}: {self.result or self.error}")
            if time.monotonic() > until:
                raise Violation(f"the run did not recover within {RECOVERY_S:g} s after {what}")
            time.sleep(0.5)
            self.progress.read()

    # Checks

    def _check_starts(self, kind: FaultKind, first: int, saved_before: int) -> int:
        """Check the step at which each start since the fault continued. Returns the number of repeated steps."""
        repeated = 0
        starts = self.progress.starts
        for number, (previous, index) in enumerate(zip(starts[first - 1 :], starts[first:], strict=False)):
            done = self.progress.events[index]["done"]
            reached = self.progress.newest("step", index, since=previous)  # an earlier start may have gone further
            saved = self.progress.newest("checkpoint", index)
            repeated += max(0, reached - done)
            if done < saved:
                self.violations.append(f"{kind}: continued from step {done}, although step {saved} was committed")
            if kind == "add_node" and number == 0 and reached - done > 1:
                self.violations.append(f"{kind}: announced, but steps {done + 1} to {reached} were repeated")
            if kind == "preempt_node" and number == 0 and saved <= saved_before:
                self.violations.append(f"{kind}: no checkpoint was saved after step {saved_before}, despite the notice")
        return repeated

    def _stop(self, driver: threading.Thread) -> None:
        self.progress.read()
        pids = [event["pid"] for event in self.progress.events if event["kind"] == "driver"]
        if driver.is_alive() and pids:
            os.kill(pids[-1], signal.SIGTERM)
        driver.join(RECOVERY_S)
        if driver.is_alive():
            self.violations.append(f"the run did not stop within {RECOVERY_S:g} s after SIGTERM")
            if pids:
                os.kill(pids[-1], signal.SIGKILL)
        self.progress.read()

    def _check_end(self) -> None:
        if self.result is None or (self.result.state, self.result.reason) != ("cancelled", "cancelled_by_user"):
            self.violations.append(f"the run did not stop as requested: {self.result or self.error}")
            return
        lines = [line for line in read_metrics(self.result.run_folder) if "loss/total" in line]
        if [line["step"] for line in lines] != list(range(1, self.result.steps + 1)):
            self.violations.append("the metrics do not contain every step")
        if not all(math.isfinite(line["loss/total"]) for line in lines):
            self.violations.append("a loss is not finite")

    def report(self) -> Iterator[str]:
        yield f"\n{'fault':>5}  {'time':>6}  {'kind':12}  {'recovered':>9}  {'starts':>6}  {'repeated':>8}"
        for number, fault in enumerate(self.faults, 1):
            yield (
                f"{number:>5}  {fault.at_s:>5.0f}s  {fault.kind:12}  {fault.recovered_after_s:>8.0f}s  "
                f"{fault.starts:>6}  {fault.repeated_steps:>8}"
            )
        steps = self.result.steps if self.result else self.progress.newest("step", len(self.progress.events))
        yield f"\n{steps} steps, {len(self.faults)} faults in {time.monotonic() - self.began:.0f} s"
        yield from (f"VIOLATION: {violation}" for violation in self.violations)
        yield f"{len(self.violations)} violations"


def _train(config: TrainConfig, watcher: EventWriter) -> RunResult:
    return train(config, watcher=watcher)


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    }


def _kill_tree(pid: int) -> None:
    """Kill a process and its descendants at once, as when a machine loses power."""
    with suppress(psutil.NoSuchProcess):
        node = psutil.Process(pid)
        for process in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="minutes during which faults are injected")
    parser.add_argument("--seed", type=int, default=0, help="seed for the order and the timing of faults")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the run's events")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped
    folder = Path(tempfile.mkdtemp(prefix="amd-soak-"))
    failed = True
    try:
        soak = Soak(folder, options.seed)
        soak.run(options.minutes)
        print("\n".join(soak.report()))
        failed = bool(soak.violations)
    finally:
        if failed or options.keep:
            print(f"the events are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    from tests.chaos import soak

    sys.exit(soak.main())  # the driver's process finds the pickled watcher by the name of its module
