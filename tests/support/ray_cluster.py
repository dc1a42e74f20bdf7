"""A Ray cluster shared by all tests in a session, on free loopback ports and with a dashboard for `ray job submit`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from service.stack.ports import free_ports

STARTUP_S = 180
ATTEMPTS = 3
NOTICE_S = 15


class RayCluster(NamedTuple):
    address: str
    """RAY_ADDRESS for a process that joins the cluster."""
    dashboard: str
    """Address for `ray job` commands."""


@pytest.fixture(scope="session")
def ray_cluster(s3_endpoint: str) -> Iterator[RayCluster]:
    """Start a cluster and set RAY_ADDRESS. Depends on the S3 server, so that workers inherit its address."""
    environment = {**os.environ, **RAY_SETTINGS}
    cluster, head, folder = start_head(environment)
    saved = dict(os.environ)
    try:
        os.environ.update(environment, RAY_ADDRESS=cluster.address)
        yield cluster
    finally:
        os.environ.clear()
        os.environ.update(saved)
        end_head(head, folder)


RAY_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(STARTUP_S),
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_worker_niceness": "0",  # at the default of 15, the other pytest process would starve workers on two cores
    "OMP_NUM_THREADS": "1",
}


def start_head(
    environment: dict[str, str], ports: Sequence[int] | None = None
) -> tuple[RayCluster, subprocess.Popen[bytes], Path]:
    """Start a head node and wait until it accepts jobs. Returns the cluster, the process and its folder.

    Retries, because the raylet waits only 30 s for its agent, which is too short on a cold or busy machine. To replace
    another head, pass its five `ports`; by default, free ports are used.
    """
    environment = {**environment, **RAY_SETTINGS}
    for attempts_left in reversed(range(ATTEMPTS)):
        port, dashboard, agent, metrics, client = ports or free_ports(5)
        folder = Path(
            tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        )  # a short path, because the length of socket paths is limited
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "4", "--num-gpus", "0"),
            *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--dashboard-agent-listen-port", str(agent), "--metrics-export-port", str(metrics)),
            *("--ray-client-server-port", str(client), "--object-store-memory", str(256 * 2**20)),
            *("--temp-dir", str(folder)),
        ]
        log = folder / "head.log"
        with log.open("wb") as out:
            head = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        cluster = RayCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
        try:
            _wait_until_up(cluster, agent, head, log)
            return cluster, head, folder
        except RuntimeError:
            end_head(head, folder)
            if not attempts_left:
                raise
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def second_node(cluster: RayCluster, cpus: int, mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """Add a second node to the cluster, identified by a resource named `mark`.

    On SIGTERM, the node announces its preemption to Ray and exits NOTICE_S later.
    """
    agent, metrics = free_ports(2)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--address", cluster.address, "--block"),
        *("--disable-usage-stats", "--node-ip-address", "127.0.0.1", "--num-cpus", str(cpus), "--num-gpus", "0"),
        *("--resources", f'{{"{mark}": 1}}', "--object-store-memory", str(128 * 2**20)),
        *("--dashboard-agent-listen-port", str(agent), "--metrics-export-port", str(metrics)),
    ]
    devnull = subprocess.DEVNULL
    environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(NOTICE_S)}
    node = subprocess.Popen(command, env=environment, stdout=devnull, stderr=devnull, start_new_session=True)
    try:
        deadline, listing = time.monotonic() + STARTUP_S, f"{cluster.dashboard}/api/v0/nodes?detail=1"
        while f'"{mark}"' not in urllib.request.urlopen(listing).read().decode():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the second node did not join")
            time.sleep(0.5)
        yield node
    finally:
        node.terminate()
        node.wait()


def _wait_until_up(cluster: RayCluster, agent: int, head: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a node is alive and its agent accepts jobs, which happens after the dashboard first responds."""
    deadline = time.monotonic() + STARTUP_S
    while True:
        reason = "no node is alive"
        try:
            urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=5)
            nodes = urllib.request.urlopen(f"{cluster.dashboard}/api/v0/nodes?detail=1", timeout=5).read()
            if b'"ALIVE"' in nodes:
                reason = "its agent does not respond"
                urllib.request.urlopen(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", timeout=5)
                return
        except OSError as error:
            reason = str(error)
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start ({reason}):\n{log.read_text()[-4000:]}")
        time.sleep(0.5)


def end_head(head: subprocess.Popen[bytes], folder: Path) -> None:
    """Stop the head and every process whose command line contains its folder."""
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue
    shutil.rmtree(folder, ignore_errors=True)
