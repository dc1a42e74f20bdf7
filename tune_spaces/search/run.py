"""Run a sweep: Ray Tune runs the trials, the ledger records them, and a report is written at the end.

Starting a sweep always resumes it: finished trials in the ledger are kept, unfinished ones restart from their runs'
checkpoints, and the ledger determines the next points. The same command therefore resumes a sweep that was stopped, or
whose driver, worker or cluster was killed.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from amd.config import ConfigError, RunProbeConfig, TrainConfig, validate, with_overrides
from amd.downstream.embedding.features import with_absolute_paths
from amd.downstream.probing.labels import open_labelled
from amd.presets.load import check_complete
from amd.storage import StorageError, exists, join, read_json, remove, resolve_root, write_json
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
from tune_spaces.search.plan import SweepPlan, make_plan
from tune_spaces.search.progress import open_progress
from tune_spaces.search.sweep import Sweep
from tune_spaces.spaces.space import Space, build_space
from tune_spaces.stop_requests import read_actor, requested_stops

logger = logging.getLogger(__name__)

POLL_S = 0.25
STOP_REQUESTS_S = 5.0  # interval between polls for requests to stop trials
COORDINATOR_TIMEOUT_S = 120.0  # for a reply from the coordinator, which does no other work
TRIALS_STOP_GRACE_S = 30.0  # in addition to checkpoint.deadline_s, for stopping trials to report
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial reports no metric
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class SearchResult(BaseModel):
    """Result of a sweep, as written to `result.json` and printed on the last line of `amd search --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None
    message: str = ""
    run_id: str
    run_folder: str
    trials: dict[str, int]
    """Number of trials by state."""
    best: dict[str, Any] | None = None
    """Best trial: its number, point and score, and the path to its training config in `config`."""
    verdict: str = ""
    report: str | None = None
    """Folder that contains the report."""
    seconds: float

    @property
    def exit_code(self) -> int:
        return 0 if self.state == "succeeded" else 1


def search(config: SearchConfig, *, quiet: bool = False) -> SearchResult:
    """Run a sweep to completion and write its report.

    Calling it again with the same name and config resumes the sweep; only budget, at_once and retries may change. On
    SIGTERM or SIGINT it stops once the running trials have saved a checkpoint. Raises ConfigError for invalid input.
    """
    began = time.monotonic()
    root = resolve_root(config.storage or config.train.storage)
    name = config.name or new_run_id("search")
    config, space = prepare_search(config, root, name)
    check_storage(root)
    steps = _steps(config)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        progress = open_progress(quiet)
        stack.callback(progress.close)
        folder = run_folder(root, name)
        _acquire_lease(stack, folder, name)
        _create_or_resume(folder, config)
        sweep = Sweep(config, space, root, name, progress)
        return _SweepDriver(sweep, steps, signals, stack).run(began)


def preview(config: SearchConfig) -> SweepPlan:
    """Plan a sweep for the cluster at RAY_ADDRESS, or for this machine, without starting it.

    Raises ConfigError in the same cases as `search`.
    """
    root = resolve_root(config.storage or config.train.storage)
    config, space = prepare_search(config, root, config.name or "preview")
    steps, scaling = _steps(config), config.train.scaling
    if "RAY_ADDRESS" in os.environ:
        from amd.training.ray.ray_train import cluster

        with cluster(scaling, logger.info):
            return _plan(config, space, steps)
    return make_plan(config, space, steps, [{"CPU": max(os.cpu_count() or 1, scaling.min_cpus)}], gpu=False)


def prepare_search(config: SearchConfig, root: str, name: str) -> tuple[SearchConfig, Space]:
    """Fill in storage, name and probe, and build the search space.

    Raises ConfigError for missing settings that have no default.
    """
    train = config.train
    with _prefix_train_problems():
        check_complete(train)
    overrides: dict[str, Any] = {"storage": root, "name": name, "train.storage": root, "train.name": None}
    if train.probe is None:
        probe = _demo_probe(train)
        if probe is None:
            raise ConfigError(
                [
                    "train.probe: required, because a sweep ranks trials by probe score on held-out labelled data, "
                    "never by loss; set probe.data.train=… to fit the probe and probe.data.test=… to score it"
                ]
            )
        overrides["train.probe"] = probe.model_dump(mode="json")
    config = with_overrides(config, overrides)
    return config, build_space(config.space, config.train)


def _steps(config: SearchConfig) -> int:
    """Return the number of steps in a full run. Raises ConfigError for invalid training or probe data."""
    train = config.train
    steps = check_data(train).steps
    assert train.probe is not None, "set by prepare_search"
    open_labelled(with_absolute_paths(train.probe.data), train.probe.classes)
    return steps


@contextmanager
def _prefix_train_problems() -> Iterator[None]:
    """Prefix the fields in a run's problems with `train.`, as they are named in a sweep's config."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"train.{line}" for line in error.problems]) from None


def _demo_probe(train: TrainConfig) -> RunProbeConfig | None:
    """Return a probe on the model-selection split of demo data, so that the test split stays unused."""
    name = train.data.train
    if not name.startswith("demo:"):
        return None
    name = name.split("/")[0]
    data = train.data.model_dump(mode="json") | {"train": f"{name}/probe", "test": f"{name}/select", "repeats": 1}
    return validate(RunProbeConfig, {"data": data})


class _SweepDriver:
    """Runs a sweep on a cluster."""

    def __init__(self, sweep: Sweep, steps: int, signals: StopSignals, stack: ExitStack) -> None:
        self.sweep, self.steps, self.signals, self.stack = sweep, steps, signals, stack

    def run(self, began: float) -> SearchResult:
        sweep, progress = self.sweep, self.sweep.progress
        config = sweep.config
        os.environ.update(ENVIRONMENT)
        try:
            from amd.training.ray.ray_train import close_groups, cluster

            self.stack.enter_context(cluster(config.train.scaling, progress.log))
        except ImportError:
            raise ConfigError(
                ["Ray is not installed; sweeps require Ray Tune: pip install 'ray[tune,train]'"]
            ) from None
        except RunError as error:
            return self._result("failed", began, error.reason, error.message)
        self.signals.install()
        plan = _plan(config, sweep.space, self.steps)
        sweep.gpus = plan.gpus
        progress.on_plan(plan, sweep.name)
        if sweep.remaining_trials():
            try:
                self._train_teacher()
            except TeacherStopped:
                return self._result("cancelled", began, "cancelled_by_user", "stopped while training the teacher")
            except RunError as error:
                return self._result("failed", began, error.reason, error.message)
            close_groups()  # free the resources of the teacher's workers for the trials
            failure = self._tune(plan.at_once)
            if failure is not None:
                message = f"Ray ended the sweep: {failure}; the same command resumes from the trials' checkpoints"
                return self._result("failed", began, "cluster_unavailable", message)
        return self._conclude(began)

    def _train_teacher(self) -> None:
        """Train the teacher once, before trials need it."""
        progress = self.sweep.progress

        def train(config: TrainConfig, run_id: str) -> RunResult:
            progress.log(f"training the teacher first: {run_id}")
            with progress.watcher() as watcher:
                return launch(config, PRETRAINING, run_id=run_id, wait=True, stop=self.signals.stop, watcher=watcher)

        self.sweep.train = resolve_teacher(self.sweep.config.train, self.sweep.root, train).config

    def _tune(self, at_once: int) -> BaseException | None:
        """Run trials until none is left or the sweep is stopped. Return the error that ended Ray Tune, if any."""
        import ray

        from amd.training.ray.coordinator import CoordinatorActor
        from amd.training.ray.ray_train import free_workers
        from tune_spaces.search.ray_tune import run_tuner

        coordinator = ray.remote(num_cpus=0)(CoordinatorActor).remote()
        failure: list[BaseException] = []

        def tune() -> None:
            try:
                with tempfile.TemporaryDirectory(prefix="amd-ray-tune-", ignore_cleanup_errors=True) as scratch:
                    run_tuner(self.sweep, coordinator, at_once, scratch)
            except BaseException as error:  # returned by the main thread
                failure.append(error)

        over = threading.Event()
        polling = threading.Thread(target=self._poll_stop_requests, args=(coordinator, over), daemon=True)
        polling.start()
        self.stack.callback(over.set)
        thread = threading.Thread(target=tune, name="ray-tune-fit", daemon=True)
        thread.start()
        deadline = float("inf")
        while thread.is_alive():
            thread.join(POLL_S)
            try:
                for event in ray.get(coordinator.drain_events.remote(), timeout=COORDINATOR_TIMEOUT_S):
                    self._handle_event(event["trial"], event)
            except ray.exceptions.RayError as error:
                lost: BaseException = error
                return lost  # the cluster, or the coordinator's node, was lost
            self.sweep.progress.refresh(self.sweep)
            if self.signals.stop.is_set() and not self.sweep.stopping.is_set():
                self.sweep.stopping.set()
                ray.get(coordinator.stop.remote())
                deadline = time.monotonic() + self.sweep.config.train.checkpoint.deadline_s + TRIALS_STOP_GRACE_S
                self.sweep.progress.log("stopping: trials are saving a final checkpoint")
            if time.monotonic() > deadline:
                self.sweep.grace_expired.set()
        for group in self.sweep.workers.values():
            free_workers(group)  # left by killed trials
        return failure[0] if failure else None

    def _poll_stop_requests(self, coordinator: Any, over: threading.Event) -> None:
        """Pass on users' requests to stop trials. Runs in a thread, because the storage may not respond."""
        sweep = self.sweep
        while True:
            with suppress(StorageError, ValueError):
                for number in requested_stops(sweep.folder) - sweep.stop_requests:
                    sweep.request_stop(number, read_actor(sweep.folder, number))
                    coordinator.stop_trial.remote(number)
            if over.wait(STOP_REQUESTS_S):
                return

    def _handle_event(self, number: int, event: dict[str, Any]) -> None:
        if event["kind"] == "workers":
            if event["placement_group"] is not None:
                self.sweep.workers[number] = event["placement_group"]
        else:
            self.sweep.progress.on_event(number, event)

    def _conclude(self, began: float) -> SearchResult:
        records = self.sweep.ledger.records.values()
        if self.sweep.stopping.is_set():
            message = "stopped; the same command resumes from the trials' checkpoints"
            return self._result("cancelled", began, "cancelled_by_user", message)
        if not any(record.completed and record.rungs for record in records):
            reasons = sorted({f"{record.reason}: {first_line(record.message)}" for record in records if record.reason})
            return self._result("failed", began, "trials_failed", "no trial reached a rung: " + "; ".join(reasons))
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
            sweep.progress.on_report(report)
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
            sweep.progress.log(f"{state} ({reason}): {message}")
        return result


def _plan(config: SearchConfig, space: Space, steps: int) -> SweepPlan:
    """Plan for the cluster that this process has joined.

    Imports Ray late, because Ray reads the environment on import.
    """
    import ray

    from amd.training.ray.ray_train import uses_gpu

    with _prefix_train_problems():
        gpu = uses_gpu(config.train.scaling)
    return make_plan(config, space, steps, [node["Resources"] for node in ray.nodes() if node["Alive"]], gpu)


def _acquire_lease(stack: ExitStack, folder: str, name: str) -> None:
    lease = Lease(join(folder, "lease.json"))
    if not lease.acquire():
        raise ConfigError(
            [f"name={name}: {lease.holder()} is running this sweep; wait for it, stop it, or use another name"]
        )
    stack.enter_context(lease)


def _create_or_resume(folder: str, config: SearchConfig) -> None:
    """Create the sweep's folder or resume from it. Raises ConfigError if the name belongs to another sweep or run."""
    if exists(join(folder, FACTS)):
        facts = read_json(join(folder, FACTS))
        if facts.get("kind") != "search":
            raise ConfigError(
                [f"name={config.name}: already used by a run of kind {facts.get('kind')}; use a different name"]
            )
        if changed := config.differences(facts["decides"]):
            raise ConfigError(
                [
                    f"name={config.name}: the sweep with that name has a different {', '.join(changed)}; only budget, "
                    "at_once and retries may change. Use another name, or restore the value to resume that sweep"
                ]
            )
    else:
        facts = {
            "id": config.name,
            "kind": "search",
            "created": datetime.now(UTC).isoformat(),
            "decides": config.identity(),
            "versions": versions(),
        }
        write_json(join(folder, FACTS), facts)
    write_json(join(folder, CONFIG), config.model_dump(mode="json"))
    remove(join(folder, RESULT))
