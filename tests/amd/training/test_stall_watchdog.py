"""Hung runs are reported with the stack traces of ranks and loader processes, and are retried."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from amd.config import TrainConfig
from amd.data.loading import loader
from amd.storage import listdir, read_bytes
from amd.training.process_group import ProcessGroup
from amd.training.reporting.progress import NullWatcher
from amd.training.run_folder import RunSpec
from amd.training.runs import launch
from amd.training.runs.kinds import PRETRAINING
from amd.training.stall_watchdog import StallWatchdog
from amd.training.trainer.pretraining import Pretraining
from amd.training.trainer.run_hooks import LoopResult, RunHooks
from tests.support.runs.tiny_runs import tiny_run


class RecordingWatcher(NullWatcher):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


class HangingOnce(Pretraining):
    """Pre-training that hangs after a step on its first attempt."""

    hung = False

    def after_step(self, done: int, batches: list[Any]) -> None:
        if done == 6 and not HangingOnce.hung:
            HangingOnce.hung = True
            wait_for_a_lost_peer()


def wait_for_a_lost_peer() -> None:
    while True:
        time.sleep(0.05)


def hanging_work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    return HangingOnce(spec, group, hooks).run()


def test_a_stalled_run_logs_all_stack_traces_and_continues_from_its_checkpoint(tmp_path: Path) -> None:
    watcher = RecordingWatcher()
    config = tiny_run(tmp_path, data__loader_workers=1, scaling__stall_timeout_s=6.0)
    result = launch.launch(config, PRETRAINING._replace(work=hanging_work), local=True, watcher=watcher)
    assert (result.state, result.steps, {*result.restarts}) == ("succeeded", 12, {"stalled"})
    # A busy machine may take as long for the first step, and then stall before step 6 too.
    start = "rank 0 has made no progress for scaling.stall_timeout_s=6 s after step 6; stack traces:"
    (report,) = (line for line in watcher.lines if line.startswith(start))
    assert "in wait_for_a_lost_peer" in report
    process = report.index("loader process")
    assert loader.__file__ in report[process:] or "torch/utils/data/_utils/worker.py" in report[process:]
    assert any("retrying from the newest checkpoint" in line for line in watcher.lines)
    errors = [
        read_bytes(f"{result.run_folder}/errors/{name}").decode() for name in listdir(f"{result.run_folder}/errors")
    ]
    assert any("in wait_for_a_lost_peer" in error for error in errors)


def test_regular_progress_prevents_a_stall_report() -> None:
    now, reports, reported = 0.0, list[str](), threading.Event()

    def on_stall(report: str) -> None:
        reports.append(report)
        reported.set()

    with StallWatchdog(0.2, 3, list, on_stall, lambda: now) as watchdog:
        for _ in range(20):
            now += 0.15
            watchdog.progress()
            time.sleep(0.02)
        assert not reports
        now += 0.3
        assert reported.wait(60)
    assert reports[0].startswith("rank 3 has made no progress for scaling.stall_timeout_s=0.2 s")


def test_runs_have_a_default_stall_limit_that_can_be_disabled() -> None:
    with StallWatchdog(None, 0, list, print):
        assert "stall-watchdog" not in [thread.name for thread in threading.enumerate()]
    limit = TrainConfig.model_fields["scaling"].default.stall_timeout_s
    assert limit is not None
    assert limit >= 600
