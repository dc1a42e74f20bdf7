"""Worker groups: Ray Train workers that stay alive between runs, and the driver side of an attempt.

Ray Train places workers, sets up torch.distributed, detects lost workers, resizes elastic groups and announces
preemption. Runs resume from our own checkpoint store (see `checkpoints`), and retries are counted in `runs.attempts`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from amd.config import ScalingConfig
from amd.training.failures import Stalled
from amd.training.rank_work import work_on_rank, work_path
from amd.training.ray.cluster import FORWARDED, free_workers, uses_gpu, wait_for_resources
from amd.training.ray.coordinator import WAIT, CoordinatorActor
from amd.training.ray.hooks import RayRunHooks
from amd.training.reporting.progress import Watcher
from amd.training.run_folder import RunSpec

logger = logging.getLogger(__name__)

POLL_S = 0.25
STEP_GRACE_S = 15.0  # added to checkpoint.deadline_s, for the step during which a stop arrives
CLOSE_S = 20.0  # time for idle workers to exit
PRELOADED_MODULES = (
    "amd.training.trainer.pretraining",
    "torch._dynamo",
)  # modules that every run needs and that take seconds to import (any optimizer imports the second)


def train_worker(settings: dict[str, Any]) -> None:
    """Execute one run after another until the coordinator is closed. Ray Train calls this function on every worker."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from amd.data.loading.processes import fork_server

    context, coordinator = ray.train.get_context(), settings["coordinator"]
    if settings["loader_processes"]:
        fork_server()  # it imports torch too, while this process waits for a run
    for module in PRELOADED_MODULES:
        importlib.import_module(module)
    device = ray.train.torch.get_device() if settings["gpu"] else torch.device("cpu")
    rank, number = context.get_world_rank(), 0
    while (task := ray.get(coordinator.next_task.remote(number))) is not None:
        if task == WAIT:
            time.sleep(POLL_S)
            continue
        number, spec = task["number"], RunSpec(**task["spec"])
        with contextlib.closing(RayRunHooks(coordinator, rank)) as hooks:
            outcome = work_on_rank(
                resolve_name(task["work"]),
                spec,
                hooks,
                rank=rank,
                world=context.get_world_size(),
                local_world=context.get_local_world_size(),
                device=device,
            )
        if rank == 0:
            ray.get(coordinator.finish.remote(number, outcome))


class WorkerGroup:
    """A group of Ray Train workers that execute runs one at a time.

    Startup takes tens of seconds on a small machine, mostly spent on imports, so a group of fixed size is reused for
    later runs, such as a student's run after its teacher's, or the demo's runs.
    """

    def __init__(self, name: str, scaling: ScalingConfig, gpu: bool, loader_processes: bool, deadline_s: float) -> None:
        import ray

        self.reusable = scaling.workers[0] == scaling.workers[1]
        self._coordinator = ray.remote(num_cpus=0)(CoordinatorActor).remote()
        self._error: BaseException | None = None
        self._lost = False
        self._stalls: list[str] = []  # reports of stalled workers
        self._placement_group: str | None = None

        def run() -> None:
            try:
                with tempfile.TemporaryDirectory(prefix="amd-ray-train-", ignore_cleanup_errors=True) as scratch:
                    settings = {"coordinator": self._coordinator, "gpu": gpu, "loader_processes": loader_processes}
                    _trainer(name, scaling, settings, scratch, deadline_s + STEP_GRACE_S).fit()
            except BaseException as error:  # raised again on the driver's thread
                self._error = error

        # In a thread, so that the main thread still receives signals and updates the progress bar.
        self._thread = threading.Thread(target=run, name="ray-train-fit", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._lost

    def attempt(
        self, spec: RunSpec, work: Callable[..., Any], deadline_s: float, stop: threading.Event, watcher: Watcher
    ) -> dict[str, Any] | None:
        """Execute a run until it ends or is stopped; return its outcome, or None if the stop exceeds its deadline.

        Raises any error from Ray Train, after which the group is unusable.
        """
        import ray

        ray.get(self._coordinator.submit.remote({"spec": spec.to_dict(), "work": work_path(work)}))
        give_up_at = float("inf")
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            outcome = self._forward_events(watcher)
            if outcome is not None:
                return outcome
            if stop.is_set() and give_up_at == float("inf"):
                give_up_at = time.monotonic() + deadline_s + STEP_GRACE_S
                ray.get(self._coordinator.stop.remote())
                watcher.log("stopping: the workers are saving a final checkpoint")
            if time.monotonic() > give_up_at:
                self._lost = True
                return None
        outcome = self._forward_events(watcher)
        if outcome is None:
            self._free()
            if self._stalls:
                raise _stalled(self._stalls)
            raise self._error or RuntimeError("the workers exited without reporting an outcome")
        return outcome

    def close(self) -> None:
        """Stop the workers and release their resources."""
        import ray

        if self.alive and ray.is_initialized():
            with contextlib.suppress(Exception):  # a lost cluster has no workers left
                ray.get(self._coordinator.close.remote(), timeout=CLOSE_S)
                self._thread.join(CLOSE_S)
        if not self.alive:
            self._free()

    def _free(self) -> None:
        """Release the workers' placement group, in case Ray's controller died before it could."""
        import ray

        if self._placement_group is not None and ray.is_initialized():
            free_workers(self._placement_group)
        self._placement_group = None

    def _forward_events(self, watcher: Watcher) -> dict[str, Any] | None:
        """Forward the workers' events to the watcher; return the outcome if an event contains one."""
        import ray

        outcome = None
        for event in ray.get(self._coordinator.drain_events.remote()):
            if event["kind"] == "outcome":
                outcome = {key: value for key, value in event.items() if key != "kind"}
            elif event["kind"] == "stall":
                self._stalls.append(event["text"])
                watcher.log(event["text"])
            else:
                if event["kind"] == "workers":
                    self._placement_group = event["placement_group"]
                watcher.on_event(event)
        return outcome


def _stalled(reports: list[str]) -> Stalled:
    """Return the error for an attempt whose workers stalled, with their reports as notes."""
    error = Stalled(f"{reports[0].splitlines()[0].removesuffix('; stack traces:')}; {len(reports)} workers stalled")
    for report in reports:
        error.add_note(report)
    return error


def await_checkpoint(coordinator: Any, limit_s: float) -> None:
    """Stop the workers' current run, if any, and wait up to `limit_s` for its checkpoint to be committed.

    Never raises: after a failure or a timeout, the run continues from its previous checkpoint.
    """
    import ray

    until = time.monotonic() + limit_s
    try:
        if ray.get(coordinator.begin_resize.remote(), timeout=limit_s):
            while not ray.get(coordinator.is_checkpointed.remote(), timeout=limit_s) and time.monotonic() < until:
                time.sleep(POLL_S)
        ray.get(coordinator.end_resize.remote(), timeout=limit_s)
    except Exception as error:
        logger.warning("no checkpoint was saved before the resize: %s", error)


_reusable_groups: dict[str, WorkerGroup] = {}  # by size and resources; closed with the outermost `cluster`


def worker_group(spec: RunSpec, scaling: ScalingConfig, stop: threading.Event) -> WorkerGroup:
    """Return a running group of this size, or start one for the run. Raises InfeasibleResources or ConfigError."""
    gpu = uses_gpu(scaling)
    key = f"{scaling.workers} of {scaling.worker_resources(gpu)}"
    found = _reusable_groups.get(key)
    if found is not None and found.alive:
        return found
    close_groups()  # they hold resources that the new one needs
    wait_for_resources(scaling, gpu, stop)
    loader_processes = spec.config["data"]["loader_workers"] > 0
    group = WorkerGroup(spec.run_id, scaling, gpu, loader_processes, spec.config["checkpoint"]["deadline_s"])
    if group.reusable:
        _reusable_groups[key] = group
    return group


def close_groups() -> None:
    """Stop idle workers to free their resources."""
    while _reusable_groups:
        _reusable_groups.popitem()[1].close()


def _trainer(name: str, scaling: ScalingConfig, settings: dict[str, Any], scratch: str, checkpoint_s: float) -> Any:
    from ray.train import FailureConfig, RunConfig
    from ray.train import ScalingConfig as RayScaling
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.callback import ControllerCallback

    coordinator = settings["coordinator"]

    class CheckpointBeforeResize(ControllerCallback):  # type: ignore[misc]  # Ray's is untyped
        """Saves a checkpoint and stops the run before Ray Train resizes the worker group."""

        def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
            await_checkpoint(coordinator, checkpoint_s)

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray's is untyped
        """A TorchTrainer without Ray's placement group cleaner.

        The cleaner is a 230 MB process per run that never exits after its controller is killed: its exit call runs
        in a thread and terminates only that thread (Ray 2.60). `free_workers` replaces it.
        """

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            kept = [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]
            return [*kept, CheckpointBeforeResize()]

    least, most = scaling.workers
    environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    return Trainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=RayScaling(
            num_workers=most if least == most else (least, most),
            use_gpu=settings["gpu"],
            resources_per_worker=scaling.worker_resources(settings["gpu"]),
            elastic_resize_monitor_interval_s=scaling.resize_interval_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=scratch,  # required by Ray; our files are stored elsewhere
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": environment} if environment else None,
        ),
    )
