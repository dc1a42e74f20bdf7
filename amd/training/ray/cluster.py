"""Join or start a Ray cluster, and wait for the resources that a worker group needs."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from amd.config import ConfigError, ScalingConfig
from amd.storage import STORAGE_CREDENTIALS
from amd.training.failures import InfeasibleResources, NoCluster

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry unless the user turns it on
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise printed lines appear twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}
OWN_CLUSTER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # this machine is not preemptible: saves a process
}
FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "AMD_DEMO_DIR",
    STORAGE_CREDENTIALS,
)
"""Environment variables that workers inherit from the driver."""


@contextlib.contextmanager
def join_cluster(scaling: ScalingConfig, log: Callable[[str], None]) -> Iterator[None]:
    """Connect to the current Ray cluster, the one at RAY_ADDRESS, or a new one on loopback.

    A connection made here is closed on exit. Raises ConfigError if RAY_ADDRESS does not respond, or
    NoCluster if Ray does not start.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    own = "RAY_ADDRESS" not in os.environ
    if own and "RAY_AUTH_MODE" not in os.environ:
        # Set explicitly: otherwise Ray writes a token into the home folder, which changes how later clusters behave.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if own:
        needed, cores = scaling.min_cpus, os.cpu_count() or 1
        if needed > cores:
            log(f"{scaling.workers[0]} workers request {needed} CPUs and share the {cores} of this machine")
        for name, value in OWN_CLUSTER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _start_own_cluster(max(needed, cores), quiet)
    else:
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise ConfigError(
                [
                    f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no Ray cluster responds ({error}); "
                    "start the cluster or unset the variable"
                ]
            ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _start_own_cluster(cpus: int, quiet: dict[str, Any], attempts: int = 3) -> None:
    """Start Ray on this machine, with retries: a busy machine may miss Ray's 30 s startup limit.

    Raises NoCluster if all attempts fail.
    """
    import ray

    for left in reversed(range(attempts)):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=256 * 2**20,  # clips do not use it
                **quiet,
            )
            return
        except Exception as error:  # Ray raises a bare Exception
            ray.shutdown()
            if not left:
                raise NoCluster(
                    f"Ray did not start on this machine ({str(error).rstrip('.')}); try again, or train with --local"
                ) from None


def uses_gpu(scaling: ScalingConfig) -> bool:
    """Return whether each worker gets a GPU; `auto` uses GPUs only if there is one for every worker.

    Raises ConfigError if scaling.device=cuda and the cluster has no GPU.
    """
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if scaling.device == "cuda" and not gpus:
        raise ConfigError(["scaling.device=cuda: the cluster has no GPU; use scaling.device=cpu or auto"])
    return scaling.device != "cpu" and gpus >= scaling.workers[0]


def wait_for_resources(scaling: ScalingConfig, gpu: bool, stop: threading.Event) -> None:
    """Wait until the cluster has free resources for the minimum number of workers, or `stop` is set.

    Ray Train itself retries forever, and an elastic group does not report that it is waiting. Raises
    InfeasibleResources after scaling.start_timeout_s.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    need, least = scaling.worker_resources(gpu), scaling.workers[0]
    until = time.monotonic() + scaling.start_timeout_s
    requested = False
    try:
        while _count_fitting(ray.available_resources(), need) < least:
            if stop.is_set():
                return
            if not requested and _count_fitting(ray.cluster_resources(), need) < least:
                with contextlib.suppress(Exception):  # the cluster may have no autoscaler
                    request_resources(bundles=[need] * least)
                requested = True
            if time.monotonic() > until:
                raise InfeasibleResources(_infeasible_message(scaling, need))
            time.sleep(0.5)
    finally:
        if requested:
            with contextlib.suppress(Exception):
                request_resources(bundles=[])


def _count_fitting(resources: dict[str, float], need: dict[str, float]) -> int:
    return int(min(resources.get(name, 0) // amount for name, amount in need.items()))


def _infeasible_message(scaling: ScalingConfig, need: dict[str, float]) -> str:
    import ray

    def shown(resources: dict[str, float]) -> str:
        return ", ".join(f"{resources.get(name, 0):g} {name}" for name in need)

    return (
        f"scaling.workers={scaling.workers[0]}: each worker needs {shown(need)}; the cluster has "
        f"{shown(ray.cluster_resources())}, of which {shown(ray.available_resources())} are free, after "
        f"scaling.start_timeout_s={scaling.start_timeout_s:g}. "
        "Request fewer workers or CPUs (scaling.workers, scaling.cpus_per_worker), wait for other jobs, or add nodes"
    )


def free_workers(placement_group: str) -> None:
    """Release the resources of a worker group whose driver was lost; no-op if they are already released.

    Ray itself releases resources only when a job ends, which is too late for jobs that continue.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    with contextlib.suppress(Exception):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(placement_group)))
