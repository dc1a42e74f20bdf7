"""Each part of a stack by itself: the command and the environment it is started with, and how it is.

Knows neither in which order parts come and go nor how they end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

from service.stack.state import HOST, MARK, STARTUP_S, Folder, Part, Process, Say, State

LOG_BYTES = 16 * 2**20  # a start puts a longer log aside
OBJECT_STORE_MIB = 256  # clips never pass through it
NOT_FOR_JOBS = ("AMD_KEY", "AMD_KEY_FILE", "AMD_URL", "AMD_DATABASE_URL", "AMD_DATA_DIR", "RAY_AUTH_TOKEN")

# Starting


def start(folder: Folder, state: State, part: Part, say: Say) -> None:
    """Start a part in the background, and write down its process."""
    say(f"starting {part}")
    if part == "ray":
        if state.ray_temp:
            shutil.rmtree(state.ray_temp, ignore_errors=True)
        state.ray_temp = tempfile.mkdtemp(prefix="amd-stack-", dir="/tmp")  # short: sockets have long names below it
        command, environment = _ray_command(state), _ray_environment(folder, state)
    else:
        command, environment = [sys.executable, "-m", "service"], _service_environment(folder, state)
    environment[MARK] = f"{folder.mark}:{part}"
    path = folder.log(part)
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with path.open("ab") as log:
        started = subprocess.Popen(
            command,
            cwd=folder.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # it outlives this command, and its Ctrl-C
        )
    state.processes[part] = Process(pid=started.pid, started=psutil.Process(started.pid).create_time())
    folder.write(state)


def _ray_command(state: State) -> list[str]:
    ports = state.ray
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", HOST, "--port", str(ports.gcs), "--num-cpus", str(state.num_cpus)),
        *("--include-dashboard", "true", "--dashboard-host", HOST, "--dashboard-port", str(ports.dashboard)),
        *("--dashboard-agent-listen-port", str(ports.agent), "--metrics-export-port", str(ports.metrics)),
        *("--ray-client-server-port", str(ports.client), "--temp-dir", str(state.ray_temp)),
        *("--object-store-memory", str(OBJECT_STORE_MIB * 2**20)),
    ]


def _ray_environment(folder: Folder, state: State) -> dict[str, str]:
    """What jobs find on their node: credentials of the storage, and none of the service's own."""
    return _without(os.environ, *NOT_FOR_JOBS, "RAY_ADDRESS") | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "AMD_STORAGE": state.storage,
        **_ray_token(folder),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else it takes 127.0.0.1 for a mistake, and listens everywhere
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{STARTUP_S:.0f}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes away the machine itself: one process less
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else printed lines come twice
    }


def _service_environment(folder: Folder, state: State) -> dict[str, str]:
    return _without(os.environ, "RAY_ADDRESS", "RAY_AUTH_TOKEN") | {
        **_ray_token(folder),
        "AMD_DATA_DIR": str(folder.path),
        "AMD_STORAGE": state.storage,
        "AMD_RAY_DASHBOARD": state.dashboard,
        "AMD_RAY_TOKEN_FILE": str(folder.ray_token),
        "AMD_ADMIN_KEY_FILE": str(state.key_file),
        "AMD_HOST": HOST,
        "AMD_PORT": str(state.port),
        "AMD_SERVE_HOST": HOST,
        "AMD_SERVE_PORT": str(state.ray.serve),
    }


def _ray_token(folder: Folder) -> dict[str, str]:
    """Explicit: what Ray does by itself depends on what ran on this machine before."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder.ray_token), "RAY_USAGE_STATS_ENABLED": "0"}


def _without(environment: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


# Looking


def trouble_of(folder: Folder, state: State, part: Part) -> str | None:
    """What keeps a part from being ready; none: it is."""
    try:
        if part == "control-plane":
            answer = httpx.get(f"{state.url}/readyz", timeout=10.0)
            return None if answer.is_success else f"it answers {answer.status_code} to /readyz"
        # The dashboard answers before a node is alive, and a node is alive before its agent takes jobs.
        headers = {"Authorization": f"Bearer {folder.ray_token.read_text()}"}
        with httpx.Client(base_url=state.dashboard, headers=headers, timeout=10.0) as ray:
            ray.get("/api/jobs/").raise_for_status()
            nodes = ray.get("/api/v0/nodes", params={"detail": 1}).raise_for_status()
            if '"ALIVE"' not in nodes.text:
                return "no node is alive yet"
        return _trouble_of_agent(state.ray.agent)
    except (httpx.HTTPError, OSError) as error:
        return f"it does not answer: {error or type(error).__name__}"


def _trouble_of_agent(port: int) -> str | None:
    """Ray 2.60 goes on without an agent's HTTP where the port is taken, and then runs no job."""
    try:
        answer = httpx.get(f"http://{HOST}:{port}/api/local_raylet_healthz", timeout=10.0)
        return None if answer.is_success else f"its agent, which takes jobs, answers {answer.status_code}"
    except httpx.HTTPError as error:
        return f"its agent, which takes jobs, does not answer at port {port}: {error or type(error).__name__}"


def reports_of(state: State) -> dict[str, str]:
    """What the control plane says of its database, its storage and Ray; nothing where it does not answer."""
    try:
        parts: dict[str, str] = httpx.get(f"{state.url}/readyz", timeout=10.0).json()["parts"]
    except (httpx.HTTPError, json.JSONDecodeError, KeyError):
        return {}
    return parts
