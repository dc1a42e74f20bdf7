"""`search`: a sweep from its config to its report. Ray Tune runs the trials; the ledger remembers them.

Every start is the same: whatever the ledger holds is taken for done, trials that were under way are begun again and
find their runs' checkpoints, and the next points follow from the ledger. So a sweep that was stopped, or whose driver,
worker or cluster was killed, goes on by the same command.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from amd.config import ConfigError, RunProbeConfig, TrainConfig, validate, with_overrides
from amd.downstream.embedding.features import absolute
from amd.downstream.probing.labels import open_labelled
from amd.presets.pretraining import check_complete
from amd.storage import exists, join, read_json, remove, resolve_root, write_json
from amd.training.failures import RunError
from amd.training.lease import Lease
from amd.training.run_folder import CONFIG, FACTS, RESULT, RunResult, new_run_id, run_folder, versions
from amd.training.runs.checks import check_data, check_storage
from amd.training.runs.kinds import PRETRAINING
from amd.training.runs.launch import launch
from amd.training.runs.teachers import TeacherStopped, resolve_teacher
from amd.training.stop_signals import StopSignals
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import first_line
from tune_spaces.report import write_report
from tune_spaces.search.plan import Plan, make_plan
from tune_spaces.search.progress import show
from tune_spaces.search.sweep import Sweep
from tune_spaces.spaces.space import Space, build_space

logger = logging.getLogger(__name__)

POLL_S = 0.25
ANSWER_S = 120.0  # for the board to answer; it does nothing else
GRACE_S = 30.0  # beyond checkpoint.deadline_s: trials that were told to stop report back
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no figure
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class SearchResult(BaseModel):
    """How a sweep ended; `result.json`, and the last line of `amd search --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None
    message: str = ""
    run_id: str
    run_folder: str
    trials: dict[str, int]
    """Counted by state."""
    best: dict[str, Any] | None = None
    """number, point, score and config (the file to train it with) of the best trial."""
    verdict: str = ""
    report: str | None = None
    """Folder of the report."""
    seconds: float

    @property
    def exit_code(self) -> int:
        return 0 if self.state == "succeeded" else 1


def search(config: SearchConfig, *, quiet: bool = False) -> SearchResult:
    """Bring a sweep to its end and write its report.

    The same name with the same config continues it; only the budget, at_once and retries may change. SIGTERM and SIGINT
    end it with the trials' checkpoints kept. Raises ConfigError for what the user can mend.
    """
    began = time.monotonic()
    root = resolve_root(config.storage or config.train.storage)
    name = config.name or new_run_id("search")
    config, space = prepared(config, root, name)
    check_storage(root)
    steps = _steps(config)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        shown = show(quiet)
        stack.callback(shown.close)
        folder = run_folder(root, name)
        _alone(stack, folder, name)
        _open(folder, config)
        sweep = Sweep(config, space, root, name, shown)
        return _Driver(sweep, steps, signals, stack).run(began)


def preview(config: SearchConfig) -> Plan:
    """The plan for the cluster that RAY_ADDRESS names, or for this machine; nothing is started.

    Raises ConfigError as `search` does.
    """
    root = resolve_root(config.storage or config.train.storage)
    config, space = prepared(config, root, config.name or "preview")
    steps, scaling = _steps(config), config.train.scaling
    if "RAY_ADDRESS" in os.environ:
        from amd.training.ray.ray_train import cluster

        with cluster(scaling, logger.info):
            return _plan(config, space, steps)
    return make_plan(config, space, steps, [{"CPU": max(os.cpu_count() or 1, scaling.least_cpus)}], gpu=False)


def prepared(config: SearchConfig, root: str, name: str) -> tuple[SearchConfig, Space]:
    """The config with all that it leaves to us, and its space. Raises ConfigError for what it leaves to the user."""
    train = config.train
    with _told_of_train():
        check_complete(train)
    overrides: dict[str, Any] = {"storage": root, "name": name, "train.storage": root, "train.name": None}
    if train.probe is None:
        probe = _demo_probe(train)
        if probe is None:
            raise ConfigError(
                [
                    "train.probe: a sweep compares trials by a probe on labelled data that is held out, never by their "
                    "losses; give probe.data.train=… (what it learns on) and probe.data.test=… (what is scored)"
                ]
            )
        overrides["train.probe"] = probe.model_dump(mode="json")
    config = with_overrides(config, overrides)
    return config, build_space(config.space, config.train)


def _steps(config: SearchConfig) -> int:
    """Of a whole run. Raises ConfigError where the data, learnt from or probed on, is not as it must be."""
    train = config.train
    steps = check_data(train).steps
    assert train.probe is not None, "prepared"
    open_labelled(absolute(train.probe.data), train.probe.classes)
    return steps


@contextmanager
def _told_of_train() -> Iterator[None]:
    """Fields of the run are told by where they stand in a sweep's config."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"train.{line}" for line in error.problems]) from None


def _demo_probe(train: TrainConfig) -> RunProbeConfig | None:
    """Demo data has a split for choosing settings; the one that is reported stays unseen."""
    name = train.data.train
    if not name.startswith("demo:"):
        return None
    name = name.split("/")[0]
    data = train.data.model_dump(mode="json") | {"train": f"{name}/probe", "test": f"{name}/select", "repeats": 1}
    return validate(RunProbeConfig, {"data": data})


class _Driver:
    """Runs a sweep on a cluster."""

    def __init__(self, sweep: Sweep, steps: int, signals: StopSignals, stack: ExitStack) -> None:
        self.sweep, self.steps, self.signals, self.stack = sweep, steps, signals, stack

    def run(self, began: float) -> SearchResult:
        sweep, shown = self.sweep, self.sweep.shown
        config = sweep.config
        os.environ.update(ENVIRONMENT)
        try:
            from amd.training.ray.ray_train import close_groups, cluster

            self.stack.enter_context(cluster(config.train.scaling, shown.say))
        except ImportError:
            raise ConfigError(
                ["Ray is not installed; a sweep runs on Ray Tune: pip install 'ray[tune,train]'"]
            ) from None
        except RunError as error:
            return self._result("failed", began, error.reason, error.message)
        self.signals.listen()
        plan = _plan(config, sweep.space, self.steps)
        shown.plan(plan, sweep.name)
        if sweep.open():
            try:
                self._teacher()
            except TeacherStopped:
                return self._result("cancelled", began, "cancelled_by_user", "stopped while the teacher was trained")
            except RunError as error:
                return self._result("failed", began, error.reason, error.message)
            close_groups()  # the teacher's workers hold what trials need
            trouble = self._tune(plan.at_once)
            if trouble is not None:
                message = f"Ray ended the sweep: {trouble}; the same command goes on from the trials' checkpoints"
                return self._result("failed", began, "cluster_unavailable", message)
        return self._concluded(began)

    def _teacher(self) -> None:
        """Make it once, before trials need it."""
        shown = self.sweep.shown

        def train(config: TrainConfig, run_id: str) -> RunResult:
            shown.say(f"the teacher comes first: {run_id}")
            with shown.watching() as watching:
                return launch(config, PRETRAINING, run_id=run_id, wait=True, stop=self.signals.stop, watching=watching)

        self.sweep.train = resolve_teacher(self.sweep.config.train, self.sweep.root, train).config

    def _tune(self, at_once: int) -> BaseException | None:
        """Run trials until nothing is left to begin, or until stopped. What Tune itself stumbled over, if it did."""
        import ray

        from amd.training.ray.coordinator import Board
        from amd.training.ray.ray_train import free_workers
        from tune_spaces.search.ray_tune import run_tuner

        board = ray.remote(num_cpus=0)(Board).remote()
        failure: list[BaseException] = []

        def tune() -> None:
            try:
                with tempfile.TemporaryDirectory(prefix="amd-ray-tune-", ignore_cleanup_errors=True) as scratch:
                    run_tuner(self.sweep, board, at_once, scratch)
            except BaseException as error:  # handed to the driver's thread
                failure.append(error)

        thread = threading.Thread(target=tune, name="ray-tune-fit", daemon=True)
        thread.start()
        give_up = float("inf")
        while thread.is_alive():
            thread.join(POLL_S)
            try:
                for event in ray.get(board.take.remote(), timeout=ANSWER_S):
                    self._see(event["trial"], event)
            except ray.exceptions.RayError as gone:
                trouble: BaseException = gone
                return trouble  # the cluster is gone, or the node that the board was on
            self.sweep.shown.beat(self.sweep)
            if self.signals.stop.is_set() and not self.sweep.stopping.is_set():
                self.sweep.stopping.set()
                ray.get(board.stop.remote())
                give_up = time.monotonic() + self.sweep.config.train.checkpoint.deadline_s + GRACE_S
                self.sweep.shown.say("stopping: trials save a last checkpoint")
            if time.monotonic() > give_up:
                self.sweep.abandoned.set()
        for group in self.sweep.workers.values():
            free_workers(group)  # trials that were ended by force
        return failure[0] if failure else None

    def _see(self, number: int, event: dict[str, Any]) -> None:
        if event["kind"] == "workers":
            if event["placement_group"] is not None:
                self.sweep.workers[number] = event["placement_group"]
        else:
            self.sweep.shown.see(number, event)

    def _concluded(self, began: float) -> SearchResult:
        records = self.sweep.ledger.records.values()
        if self.sweep.stopping.is_set():
            message = "stopped; the same command goes on from the trials' checkpoints"
            return self._result("cancelled", began, "cancelled_by_user", message)
        if not any(record.ended_well for record in records):
            reasons = sorted({f"{record.reason}: {first_line(record.message)}" for record in records if record.reason})
            return self._result("failed", began, "trials_failed", "no trial came to a rung: " + "; ".join(reasons))
        return self._result("succeeded", began)

    def _result(self, state: Any, began: float, reason: str | None = None, message: str = "") -> SearchResult:
        sweep = self.sweep
        records = sweep.ledger.records.values()
        counts = dict(sorted(Counter(record.state for record in records).items()))
        facts: dict[str, Any] = {}
        if any(record.rungs for record in records):
            report = write_report(sweep.folder)
            facts = {"verdict": report.verdict, "report": report.folder}
            if report.best is not None:
                best = sweep.ledger.records[report.best]
                facts["best"] = {
                    "number": best.number,
                    "point": best.point,
                    "score": best.score,
                    "config": join(report.folder, "best.json"),
                }
            sweep.shown.report(report)
        result = SearchResult(
            state=state,
            reason=reason,
            message=message,
            run_id=sweep.name,
            run_folder=sweep.folder,
            trials=counts,
            seconds=round(time.monotonic() - began, 3),
            **facts,
        )
        write_json(join(sweep.folder, RESULT), result.model_dump(mode="json"))
        if state != "succeeded":
            sweep.shown.say(f"{state} ({reason}): {message}")
        return result


def _plan(config: SearchConfig, space: Space, steps: int) -> Plan:
    """For the cluster that this process has joined: before that Ray must not be imported, it reads its environment."""
    import ray

    from amd.training.ray.ray_train import uses_gpu

    with _told_of_train():
        gpu = uses_gpu(config.train.scaling)
    return make_plan(config, space, steps, [node["Resources"] for node in ray.nodes() if node["Alive"]], gpu)


def _alone(stack: ExitStack, folder: str, name: str) -> None:
    lease = Lease(join(folder, "lease.json"))
    if not lease.acquire():
        raise ConfigError(
            [f"name={name}: {lease.holder()} runs this sweep now; wait for it, stop it, or take another name"]
        )
    stack.enter_context(lease)


def _open(folder: str, config: SearchConfig) -> None:
    """Begin a sweep or find it again. Raises ConfigError when another one has that name."""
    if exists(join(folder, FACTS)):
        facts = read_json(join(folder, FACTS))
        if facts.get("kind") != "search":
            raise ConfigError([f"name={config.name}: is a run of kind {facts.get('kind')}; take another name"])
        there, asked = facts["decides"], config.decides()
        changed = sorted(key for key in asked if there.get(key) != asked[key])
        if changed:
            raise ConfigError(
                [
                    f"name={config.name}: a sweep of that name has another {', '.join(changed)}; only budget, at_once "
                    "and retries may change. Take another name, or put it back to continue the one there"
                ]
            )
    else:
        facts = {
            "id": config.name,
            "kind": "search",
            "created": datetime.now(UTC).isoformat(),
            "decides": config.decides(),
            "versions": versions(),
        }
        write_json(join(folder, FACTS), facts)
    write_json(join(folder, CONFIG), config.model_dump(mode="json"))
    remove(join(folder, RESULT))
