"""Launch a run: from a config to a published encoder, on Ray Train or in this process.

Used by the CLI, the API and search. Checks the config, trains the teacher if the run needs one, then attempts the run
until it ends or a retry budget is exhausted. Does not depend on the kind of run (`kinds`) or the training loop
(`trainer.loop`).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

from amd.config import ConfigError, RunConfig, TrainConfig, with_overrides
from amd.data.dataset.manifest_cache import ManifestCache, keep_manifests
from amd.presets.teachers import with_teacher_data
from amd.storage import StorageUnreachable, join, remove, resolve_root, write_json
from amd.training.failures import RunError, Stalled, Verdict
from amd.training.lease import Lease
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.reporting.prober import Prober
from amd.training.reporting.progress import Watcher, choose_watcher, duration
from amd.training.run_folder import (
    BAD_SAMPLES,
    LEASE,
    RESULT,
    RunResult,
    RunSpec,
    TeacherTraining,
    is_of_this_job,
    new_run_id,
    open_run,
    run_folder,
    spec_of,
)
from amd.training.runs.attempts import Attempt, attempt_until_done
from amd.training.runs.checks import DataFacts, check_machine, check_storage
from amd.training.runs.forks import find_parent
from amd.training.runs.kinds import PRETRAINING, ResolvedRun, RunKind
from amd.training.runs.teachers import TeacherStopped
from amd.training.runs.torch_ranks import RankHooks, TorchRanks, find_place, join_ranks
from amd.training.stop_signals import StopSignals
from amd.training.trainer.open_data import MANIFESTS


def train(config: TrainConfig, **options: Any) -> RunResult:
    """Pre-train an encoder as configured, and publish it. `options` are passed to `launch`."""
    return launch(with_teacher_data(config), PRETRAINING, **options)


def launch(
    config: RunConfig,
    kind: RunKind,
    *,
    local: bool = False,
    distributed: bool = False,
    run_id: str | None = None,
    quiet: bool = False,
    until: int | None = None,
    parent: tuple[str, int] | None = None,
    wait: bool = False,
    stop: threading.Event | None = None,
    watcher: Watcher | None = None,
) -> RunResult:
    """Train a run to completion and publish its encoder.

    Calling it again with the same name and config resumes the run, or returns its result if it has succeeded. SIGTERM
    and SIGINT stop the run with a checkpoint within checkpoint.deadline_s. For `ray job stop`, set
    RAY_JOB_STOP_WAIT_TIME_S in the job's environment to a larger value, since Ray kills the job after 3 s by default.

    `local`: train in this process, without Ray.
    `distributed`: train on the processes that torchrun or srun started. Each of them calls this function, which returns
    on rank 0 only; the other processes exit with rank 0's exit code. torchrun is recognised without this option.
    `until`: save a checkpoint and pause after this step (state `paused`); call again with another value to continue.
    `parent`: run and step of the checkpoint that a new run starts from, under the same storage root.
    `wait`: if another process is already training the run, wait for its result instead of raising.
    `stop`: event that stops the run in the same way as SIGTERM.
    `watcher`: receives the events; by default they are shown as a progress bar or as log lines.
    Raises ConfigError for problems that the user can fix; the result reports all other failures.
    """
    root = resolve_root(config.storage)
    with join_ranks(None if local else find_place(distributed), config, stop) as ranks:
        if ranks is not None:
            config, wait = ranks.config, True  # after a restart, the lease of a killed process may still be valid
        run_id = run_id or config.name or new_run_id(kind.name)
        config = with_overrides(config, {"name": run_id})  # also validates the name
        watcher = watcher or choose_watcher(quiet)
        with closing(watcher), StopSignals(stop) as signals:
            check_storage(root)
            check_machine(config, local)
            with closing(_Runner(root, local, ranks, signals, watcher)) as runner:
                try:
                    result = runner.train(config, kind, run_id, wait, until, parent)
                except StorageUnreachable as error:
                    folder, reason = run_folder(root, run_id), "storage_unreachable"
                    result = RunResult(
                        state="failed", reason=reason, message=str(error), run_id=run_id, run_folder=folder
                    )
            if result.state not in ("succeeded", "paused"):
                watcher.log(f"{result.state} ({result.reason}): {result.message}")
        if ranks is not None:
            ranks.exit_code = result.exit_code
        return result


class _Runner:
    """Executes one or two training runs on the same cluster: the teacher's, if needed, then the student's."""

    def __init__(
        self, root: str, local: bool, ranks: TorchRanks | None, signals: StopSignals, watcher: Watcher
    ) -> None:
        self.root, self.local, self.ranks, self.signals, self.stop = root, local, ranks, signals, signals.stop
        self.watcher = watcher
        self._stack = ExitStack()
        self._on_cluster = False
        self._teacher: TeacherTraining | None = None
        self._already_trained: set[str] = set()

    def close(self) -> None:
        self._stack.close()

    def train(
        self,
        config: RunConfig,
        kind: RunKind,
        run_id: str,
        wait: bool = False,
        until: int | None = None,
        parent: tuple[str, int] | None = None,
    ) -> RunResult:
        """Train one run. If another process is already training it, raise, or wait for its result if `wait` is set."""
        with keep_manifests() as manifests:
            return self._train(config, kind, run_id, manifests, wait, until, parent)

    def _train(
        self,
        config: RunConfig,
        kind: RunKind,
        run_id: str,
        manifests: ManifestCache,
        wait: bool,
        until: int | None,
        parent: tuple[str, int] | None,
    ) -> RunResult:
        started = time.monotonic()
        data = kind.check(config)
        with self._exclusive(run_id, wait) as stopped:
            if stopped:
                return self._result(run_id, "cancelled", started, reason="cancelled_by_user", message="stopped")
            kind.check_weights(config)
            if parent is None and isinstance(config, TrainConfig):
                parent = find_parent(config, self.root, run_id, data.steps)
            facts = {"digest": data.digest, "samples": data.samples}
            parent_run = parent[0] if parent else None
            previous = open_run(self.root, run_id, config, kind=kind.name, data=facts, parent=parent_run)
            if previous is not None:
                self._already_trained.add(run_id)
                self.watcher.log(f"{run_id} has already succeeded; its encoder is {previous.encoder_folder}")
                return previous
            folder = run_folder(self.root, run_id)
            remove(join(folder, RESULT))
            if not self.local and self.ranks is None:
                manifests.move_to(join(folder, MANIFESTS))  # workers are separate processes
            result = self._run(config, kind, run_id, data, started, until, parent)
            write_json(join(result.run_folder, RESULT), result.model_dump(mode="json"))
            if bad := int(result.figures.get("data/bad_samples", 0)):
                listed = join(folder, BAD_SAMPLES)
                self.watcher.log(f"{bad} of {data.samples} samples could not be read and are listed in {listed}")
            return result

    def _run(
        self,
        config: RunConfig,
        kind: RunKind,
        run_id: str,
        data: DataFacts,
        started: float,
        until: int | None,
        parent: tuple[str, int] | None,
    ) -> RunResult:
        try:
            resolved: ResolvedRun = kind.resolve(config, self.root, self._train_teacher)
            if resolved.config != config:
                kind.check_weights(resolved.config)
            if not self.local and self.ranks is None:
                self._join_cluster(config)
        except TeacherStopped:
            return self._result(run_id, "cancelled", started, reason="cancelled_by_user", message="stopped")
        except RunError as error:
            return self._result(run_id, "failed", started, reason=error.reason, message=error.message)
        spec = spec_of(run_id, self.root, resolved.config, data.digest, until, parent)
        with self._probing(config, kind, spec):
            attempt, retry = self._attempt(config, kind), self.ranks is None
            outcome, restarts = attempt_until_done(spec, config, attempt, self.stop, self.watcher, retry=retry)
        if isinstance(outcome, Verdict):
            result = self._result(run_id, "failed", started, reason=outcome.reason, message=outcome.message)
        elif outcome is None:
            result = self._cancelled(run_id, started, None)
        elif outcome["finished"]:
            result = self._publish(config, kind, resolved, run_id, data, started)
        elif until is not None and outcome["steps"] >= until and outcome["saved"]:
            message = f"paused after step {outcome['steps']}"
            result = self._result(run_id, "paused", started, steps=outcome["steps"], message=message)
        else:
            result = self._cancelled(run_id, started, outcome)
        return result.model_copy(update={"restarts": dict(restarts)})

    @contextmanager
    def _probing(self, config: RunConfig, kind: RunKind, spec: RunSpec) -> Iterator[None]:
        """Probe checkpoints during the run if the config has a `probe` section."""
        probe = config.probe if isinstance(config, TrainConfig) and kind.supports_probe else None
        if probe is None:
            yield
            return
        watcher = self.watcher
        self.watcher = prober = Prober(watcher, spec.folder, probe)
        try:
            yield
        finally:
            self.watcher = watcher
            (prober.abandon if self.stop.is_set() else prober.close)()

    def _train_teacher(self, config: TrainConfig, run_id: str) -> RunResult:
        self.watcher.log(f"training the teacher first: {run_id}")
        result = self.train(config, PRETRAINING, run_id, wait=True)
        if result.state == "succeeded":
            took = f"{result.steps} steps in {duration(result.seconds)}"
            self.watcher.log(f"the teacher is trained ({took}); training the student")
            reused = run_id in self._already_trained and not is_of_this_job(self.root, run_id)
            self._teacher = TeacherTraining(run_id=run_id, steps=result.steps, seconds=result.seconds, reused=reused)
            self.watcher.on_event({"kind": "teacher", "training": self._teacher.model_dump(mode="json")})
        return result

    def _attempt(self, config: RunConfig, kind: RunKind) -> Attempt:
        if self.ranks is not None:
            return partial(self.ranks.attempt, kind.work, RankHooks(self.stop, self.watcher))
        return self._local_attempt(kind) if self.local else self._ray_attempt(config, kind)

    def _local_attempt(self, kind: RunKind) -> Attempt:
        from dataclasses import asdict

        import torch

        from amd.device import choose_device
        from amd.training.process_group import ProcessGroup

        def attempt(spec: RunSpec) -> dict[str, Any]:
            scaling = spec.scaling()
            if scaling.threads_per_worker:
                torch.set_num_threads(scaling.threads_per_worker)
            hooks = LocalRunHooks(self.stop, self.watcher)
            with closing(ProcessGroup(device=choose_device(scaling.device))) as group:
                try:
                    return asdict(kind.work(spec, group, hooks))
                except Stalled as error:
                    error.add_note(hooks.stall_report)
                    raise

        return attempt

    def _ray_attempt(self, config: RunConfig, kind: RunKind) -> Attempt:
        from amd.training.ray.ray_train import fit

        deadline_s = config.checkpoint.deadline_s
        return lambda spec: fit(spec, kind.work, config.scaling, deadline_s, self.stop, self.watcher)

    def _join_cluster(self, config: RunConfig) -> None:
        """Connect to Ray once for teacher and student; `close` disconnects."""
        if self._on_cluster:
            return
        try:
            from amd.training.ray.ray_train import cluster

            self._stack.enter_context(cluster(config.scaling, self.watcher.log))
        except ImportError:
            raise ConfigError(["Ray is not installed; train in this process with --local"]) from None
        self._on_cluster = True
        self.signals.install()

    # Results

    def _publish(
        self, config: RunConfig, kind: RunKind, resolved: ResolvedRun, run_id: str, data: DataFacts, started: float
    ) -> RunResult:
        try:
            folder = kind.publish(config, resolved, self.root, run_id, data)
        except Exception as error:
            message = f"training finished, but the encoder could not be published: {error}"
            return self._result(run_id, "failed", started, reason="storage_unreachable", message=message)
        self.watcher.log(f"published {folder}")
        return self._result(run_id, "succeeded", started, encoder_folder=folder, steps=data.steps)

    def _cancelled(self, run_id: str, started: float, outcome: dict[str, Any] | None) -> RunResult:
        if outcome is None or not outcome["saved"]:
            message = "stopped, but the last checkpoint was not written within checkpoint.deadline_s; "
            message += "run the same command to continue from the previous one"
            steps = outcome["steps"] if outcome else 0
            return self._result(run_id, "cancelled", started, reason="deadline_exceeded", message=message, steps=steps)
        if outcome["steps"] == 0:
            return self._result(
                run_id, "cancelled", started, reason="cancelled_by_user", message="stopped before the first step"
            )
        steps = outcome["steps"]
        message = f"stopped after step {steps}, whose checkpoint is saved; run the same command to continue from there"
        return self._result(run_id, "cancelled", started, reason="cancelled_by_user", message=message, steps=steps)

    def _result(self, run_id: str, state: Any, started: float, **facts: Any) -> RunResult:
        folder = run_folder(self.root, run_id)
        lines = [line for line in read_metrics(folder) if "loss/total" in line]
        last = lines[-1] if lines else {}
        figures = {name: value for name, value in last.items() if "/" in name}
        facts.setdefault("steps", last.get("step", 0))
        seconds = round(time.monotonic() - started, 3)
        facts |= {"figures": figures, "seconds": seconds, "teacher": self._teacher}
        return RunResult(state=state, run_id=run_id, run_folder=folder, **facts)

    @contextmanager
    def _exclusive(self, run_id: str, wait: bool) -> Iterator[bool]:
        """Hold the run's lease. Yields whether a stop was requested while waiting for the lease."""
        lease = Lease(join(run_folder(self.root, run_id), LEASE))
        announced = False
        while not lease.acquire():
            holder = lease.holder()
            if not wait:
                raise ConfigError(
                    [f"name={run_id}: {holder} is training this run; wait for it, stop it, or choose another name"]
                )
            if not announced:
                self.watcher.log(f"waiting for {run_id}, which {holder} is training")
                announced = True
            if self.stop.wait(1.0):
                yield True
                return
        with lease:
            yield False


class LocalRunHooks(RankHooks):
    """Hooks for a run in this process; a stall ends the run but not the process."""

    def __init__(self, stop: threading.Event, watcher: Watcher) -> None:
        super().__init__(stop, watcher)
        self._training_thread = threading.get_ident()
        self.stall_report = ""

    def stalled(self, report: str) -> None:
        """Raise Stalled in the training thread as soon as it executes Python code again."""
        self.stall_report = report
        self._watcher.log(report)
        thread, error = ctypes.c_ulong(self._training_thread), ctypes.py_object(Stalled)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)
