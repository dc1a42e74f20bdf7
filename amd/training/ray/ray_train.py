"""Ray Train around the worker: a cluster to run on, the worker group, and the wire between workers and driver.

The one place of training that imports Ray. Ray Train places workers, sets up torch.distributed, finds out when one is
lost, resizes elastic groups and announces preemption. What continues a run lies in our own checkpoint store (see
`checkpoints`), and each fit is one attempt: `launch` counts retries and charges every failure to its budget.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from amd.config import ConfigError, ScalingConfig
from amd.training.failures import InfeasibleResources, NoCluster
from amd.training.ray.coordinator import WAIT, Board
from amd.training.reporting.progress import Event, Watcher
from amd.training.run_folder import RunSpec

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry unless the user turns it on
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else printed lines come twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}
OWN_CLUSTER = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes away the machine itself: one process less
}
FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "AMD_DEMO_DIR",
)
POLL_S = 0.25
GRACE_S = 15.0  # beyond checkpoint.deadline_s, for the step in which a stop arrives
HEAVY = (
    "amd.training.trainer.pretraining",
    "torch._dynamo",
)  # every run needs them, the second for any optimizer; seconds each
CLOSE_S = 20.0  # for idle workers to end

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def cluster(scaling: ScalingConfig, say: Callable[[str], None]) -> Iterator[None]:
    """A Ray cluster to train on: the one this process is in, the one of RAY_ADDRESS, or one of its own on loopback."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    own = "RAY_ADDRESS" not in os.environ
    if own and "RAY_AUTH_MODE" not in os.environ:
        # Explicit: by default Ray writes a token into the home folder, and later clusters behave otherwise.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        with _inside():
            yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if own:
        needed, cores = scaling.least_cpus, os.cpu_count() or 1
        if needed > cores:
            say(f"{scaling.workers[0]} workers ask for {needed} CPUs and share the {cores} of this machine")
        for name, value in OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
        _start_own(max(needed, cores), quiet)
    else:
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise ConfigError(
                [f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no Ray cluster answers ({error}); start it or unset it"]
            ) from None
    try:
        with _inside():
            yield
    finally:
        ray.shutdown()


_depth = 0


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    """Worker groups last as long as the outermost of these."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            close_groups()


def _start_own(cpus: int, quiet: dict[str, Any], tries: int = 3) -> None:
    """Ray gives its own parts 30 s to come up, which a busy machine may miss. Raises NoCluster."""
    import ray

    for left in reversed(range(tries)):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=256 * 2**20,  # clips never pass through it
                **quiet,
            )
            return
        except Exception as error:  # a bare Exception is what Ray raises
            ray.shutdown()
            if not left:
                raise NoCluster(
                    f"Ray did not start on this machine: {error} Try again, or train with --local"
                ) from None


class RayEdge:
    """What lies around the loop on a Ray Train worker, for one run.

    Metrics do not go through `ray.train.report`: Ray 2.60 holds one at a time and takes it at its health check, once a
    second, so a run that logs more often would wait; and nobody reads them there.
    """

    def __init__(self, board: Any, rank: int) -> None:
        self._board = board
        self._stop, self._over = threading.Event(), threading.Event()
        if rank == 0:
            listen_for_stop(board, self._stop, self._over)
            self.tell({"kind": "workers", "placement_group": _placement_group()})

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def preempted(self) -> bool:
        import ray.train

        return ray.train.get_preemption_info() is not None

    def tell(self, event: Event) -> None:
        self._board.tell.remote(event)

    def close(self) -> None:
        self._over.set()


def listen_for_stop(board: Any, stop: threading.Event, over: threading.Event) -> None:
    """Set `stop` once the board's driver wishes so, in a thread that ends when `over` is set."""
    import ray

    def listen() -> None:
        while not over.wait(1.0):
            try:
                if ray.get(board.stop_requested.remote(), timeout=30):
                    stop.set()
                    return
            except Exception:  # the driver is gone, and this process with it
                return

    threading.Thread(target=listen, name="stop-listener", daemon=True).start()


def _placement_group() -> str | None:
    """What holds this worker's place: whoever outlives its driver may have to give it back."""
    from ray.util.placement_group import get_current_placement_group

    group = get_current_placement_group()
    return group.id.hex() if group is not None else None


def free_workers(placement_group: str) -> None:
    """Give back what a worker group holds whose driver was lost; a group that is gone is no mistake.

    Of a job that ended, however it ended, Ray itself gives back all; this is for one that goes on.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    with contextlib.suppress(Exception):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(placement_group)))


def train_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every worker: one run after the other, until the board has no more."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from amd.data.loading.processes import fork_server
    from amd.training.process_group import Team

    context, board = ray.train.get_context(), settings["board"]
    fork_server()  # it imports torch too, while this process waits for a run
    for module in HEAVY:
        importlib.import_module(module)
    device = ray.train.torch.get_device() if settings["gpu"] else torch.device("cpu")
    cores = (os.cpu_count() or 1) // context.get_local_world_size()
    number = 0
    while (task := ray.get(board.task_after.remote(number))) is not None:
        if task == WAIT:
            time.sleep(POLL_S)
            continue
        number, spec = task["number"], RunSpec(**task["spec"])
        torch.set_num_threads(spec.scaling().threads_per_worker or max(1, cores))
        team = Team(context.get_world_rank(), context.get_world_size(), device)
        with contextlib.closing(RayEdge(board, team.rank)) as edge:
            outcome = _function(task["work"])(spec, team, edge)
        if team.leads:
            ray.get(board.finish.remote(number, asdict(outcome)))


def _function(named: str) -> Callable[..., Any]:
    """`module:name`, a function of a module."""
    module, _, name = named.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def fit(
    spec: RunSpec,
    work: Callable[..., Any],
    scaling: ScalingConfig,
    deadline_s: float,
    stop: threading.Event,
    watcher: Watcher,
) -> dict[str, Any] | None:
    """One attempt on the cluster; the outcome as plain data, None when a stop ran past its deadline.

    Raises what Ray Train raises, and InfeasibleResources.
    """
    group = _group(spec.run_id, scaling, stop)
    outcome = group.attempt(spec, work, deadline_s, stop, watcher)
    if not group.lasts:
        group.close()
    return outcome


class WorkerGroup:
    """Ray Train workers, for one run after the other.

    To start them takes tens of seconds on a small machine, most of it imports, so a group of fixed size stays for the
    runs that come after: a student after its teacher, the demo's one by one.
    """

    def __init__(self, name: str, scaling: ScalingConfig, gpu: bool) -> None:
        import ray

        self.lasts = scaling.workers[0] == scaling.workers[1]
        self._board = ray.remote(num_cpus=0)(Board).remote()
        self._error: BaseException | None = None
        self._lost = False
        self._place: str | None = None

        def run() -> None:
            try:
                with tempfile.TemporaryDirectory(prefix="amd-ray-train-", ignore_cleanup_errors=True) as scratch:
                    _trainer(name, scaling, gpu, self._board, scratch).fit()
            except BaseException as error:  # handed to the driver's thread
                self._error = error

        # In a thread, so that the driver's keeps hearing signals and moving the progress bar.
        self._thread = threading.Thread(target=run, name="ray-train-fit", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._lost

    def attempt(
        self, spec: RunSpec, work: Callable[..., Any], deadline_s: float, stop: threading.Event, watcher: Watcher
    ) -> dict[str, Any] | None:
        """Work on a run until it ends or is stopped; the outcome, None past the deadline. Raises what Ray Train raises,
        and the group is then lost."""
        import ray

        # By name: the board would import torch to hold the function itself.
        named = f"{work.__module__}:{work.__qualname__}"
        ray.get(self._board.offer.remote({"spec": spec.to_dict(), "work": named}))
        give_up = float("inf")
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            outcome = self._deliver(watcher)
            if outcome is not None:
                return outcome
            if stop.is_set() and give_up == float("inf"):
                give_up = time.monotonic() + deadline_s + GRACE_S
                ray.get(self._board.stop.remote())
                watcher.say("stopping: the workers save a last checkpoint")
            if time.monotonic() > give_up:
                self._lost = True
                return None
        outcome = self._deliver(watcher)
        if outcome is None:
            self._give_back()
            raise self._error or RuntimeError("the workers ended without an outcome")
        return outcome

    def close(self) -> None:
        """Let the workers end."""
        import ray

        if self.alive and ray.is_initialized():
            with contextlib.suppress(Exception):  # a cluster that is gone has no workers left
                ray.get(self._board.close.remote(), timeout=CLOSE_S)
                self._thread.join(CLOSE_S)
        if not self.alive:
            self._give_back()

    def _give_back(self) -> None:
        """What the workers held, where whoever placed them died before it could."""
        import ray

        if self._place is not None and ray.is_initialized():
            free_workers(self._place)
        self._place = None

    def _deliver(self, watcher: Watcher) -> dict[str, Any] | None:
        import ray

        outcome = None
        for event in ray.get(self._board.take.remote()):
            if event["kind"] == "outcome":
                outcome = {key: value for key, value in event.items() if key != "kind"}
            else:
                if event["kind"] == "workers":
                    self._place = event["placement_group"]
                watcher.see(event)
        return outcome


_groups: dict[str, WorkerGroup] = {}  # those that last, by what they ask for; closed with the outermost `cluster`


def _group(name: str, scaling: ScalingConfig, stop: threading.Event) -> WorkerGroup:
    """A group that is there, or a new one. Raises InfeasibleResources and ConfigError."""
    gpu = uses_gpu(scaling)
    key = f"{scaling.workers} of {scaling.worker_resources(gpu)}"
    found = _groups.get(key)
    if found is not None and found.alive:
        return found
    close_groups()  # they hold what the new one needs
    _wait_for_room(scaling, gpu, stop)
    group = WorkerGroup(name, scaling, gpu)
    if group.lasts:
        _groups[key] = group
    return group


def close_groups() -> None:
    """Let workers that wait for a run end: others need what they hold."""
    while _groups:
        _groups.popitem()[1].close()


def _trainer(
    name: str,
    scaling: ScalingConfig,
    gpu: bool,
    board: Any,
    scratch: str,
) -> Any:
    from ray.train import FailureConfig, RunConfig
    from ray.train import ScalingConfig as RayScaling
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray's is untyped
        """Without Ray's cleaner, a process of 230 MB for each run that outlives a killed controller for good: it ends
        itself in a thread, which ends the thread alone (Ray 2.60). `free_workers` does what it is for."""

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    least, most = scaling.workers
    environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    return Trainer(
        train_worker,
        train_loop_config={"board": board, "gpu": gpu},
        scaling_config=RayScaling(
            num_workers=most if least == most else (least, most),
            use_gpu=gpu,
            resources_per_worker=scaling.worker_resources(gpu),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=scratch,  # nothing of ours is kept there
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": environment} if environment else None,
        ),
    )


def uses_gpu(scaling: ScalingConfig) -> bool:
    """auto: where the cluster has a GPU for every worker. Raises ConfigError when asked for GPUs it does not have."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if scaling.device == "cuda" and not gpus:
        raise ConfigError(["scaling.device=cuda: the cluster has no GPU; take scaling.device=cpu or auto"])
    return scaling.device != "cpu" and gpus >= scaling.workers[0]


def _wait_for_room(scaling: ScalingConfig, gpu: bool, stop: threading.Event) -> None:
    """Wait until the cluster has free what the fewest workers need. Raises InfeasibleResources after a while.

    Ray Train itself would ask again for ever, and an elastic group gives no sign that it waits.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    need, least = scaling.worker_resources(gpu), scaling.workers[0]
    until = time.monotonic() + scaling.start_timeout_s
    asked = False
    try:
        while _fitting(ray.available_resources(), need) < least:
            if stop.is_set():
                return
            if not asked and _fitting(ray.cluster_resources(), need) < least:
                with contextlib.suppress(Exception):  # a cluster without autoscaler
                    request_resources(bundles=[need] * least)
                asked = True
            if time.monotonic() > until:
                raise InfeasibleResources(_infeasible(scaling, need))
            time.sleep(0.5)
    finally:
        if asked:
            with contextlib.suppress(Exception):
                request_resources(bundles=[])


def _fitting(resources: dict[str, float], need: dict[str, float]) -> int:
    return int(min(resources.get(name, 0) // amount for name, amount in need.items()))


def _infeasible(scaling: ScalingConfig, need: dict[str, float]) -> str:
    import ray

    def shown(resources: dict[str, float]) -> str:
        return ", ".join(f"{resources.get(name, 0):g} {name}" for name in need)

    return (
        f"scaling.workers={scaling.workers[0]} need {shown(need)} each; the cluster has "
        f"{shown(ray.cluster_resources())}, of which {shown(ray.available_resources())} free, after "
        f"scaling.start_timeout_s={scaling.start_timeout_s:g}. "
        "Ask for fewer workers or CPUs (scaling.workers, scaling.cpus_per_worker), wait for other jobs, or add nodes"
    )
