"""Start a single part of a stack and check whether it is ready.

Other modules decide the order in which parts start and stop, and terminate them.
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

from service.settings import Settings
from service.stack.state import HOST, MARK, STARTUP_S, Part, PartProcess, ProgressCallback, StackFolder, StackState

LOG_BYTES = 16 * 2**20  # a longer log is rotated
OBJECT_STORE_MIB = 256  # clips do not pass through the object store
ALLOWED = "AMD_ALLOWED_URIS"
NOT_FOR_JOBS = ("AMD_KEY", "AMD_KEY_FILE", "AMD_URL", "AMD_DATABASE_URL", "AMD_DATA_DIR", "RAY_AUTH_TOKEN")

# Starting


def start(folder: StackFolder, state: StackState, part: Part, on_progress: ProgressCallback) -> None:
    """Start a part in the background, and record its process."""
    on_progress(f"starting {part}")
    if part == "ray":
        if state.ray_temp:
            shutil.rmtree(state.ray_temp, ignore_errors=True)
        # A short path, because the length of socket paths is limited.
        state.ray_temp = tempfile.mkdtemp(prefix="amd-stack-", dir="/tmp")
        command, environment = _ray_command(state), _ray_environment(folder, state)
    elif part == "supervisor":  # it derives the parts' environments from that of `amd up`
        command, environment = [sys.executable, "-m", "service.stack.supervisor", str(folder.path)], dict(os.environ)
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
            start_new_session=True,  # survives this command and Ctrl-C
        )
    state.processes[part] = PartProcess(pid=started.pid, started=psutil.Process(started.pid).create_time())
    folder.write(state)


def _ray_command(state: StackState) -> list[str]:
    ports = state.ray
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", HOST, "--port", str(ports.gcs), "--num-cpus", str(state.num_cpus)),
        *("--include-dashboard", "true", "--dashboard-host", HOST, "--dashboard-port", str(ports.dashboard)),
        *("--dashboard-agent-listen-port", str(ports.agent), "--metrics-export-port", str(ports.metrics)),
        *("--ray-client-server-port", str(ports.client), "--temp-dir", str(state.ray_temp)),
        *("--object-store-memory", str(OBJECT_STORE_MIB * 2**20)),
    ]


def _ray_environment(folder: StackFolder, state: StackState) -> dict[str, str]:
    """Return the environment for jobs, with credentials for the storage root but not for the service."""
    return _without(os.environ, *NOT_FOR_JOBS, "RAY_ADDRESS") | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "AMD_STORAGE": state.storage,
        **_ray_token(folder),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray replaces 127.0.0.1 and listens on all interfaces
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{STARTUP_S:.0f}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # saves a process: this machine is not preemptible
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise printed lines appear twice
    }


def _service_environment(folder: StackFolder, state: StackState) -> dict[str, str]:
    own = _ray_token(folder) | _service_settings(folder, state)
    if state.allowed:
        own[ALLOWED] = ",".join(filter(None, (os.environ.get(ALLOWED), *state.allowed)))
    return _without(os.environ, "RAY_ADDRESS", "RAY_AUTH_TOKEN") | own


def _service_settings(folder: StackFolder, state: StackState) -> dict[str, str]:
    """Return the settings that the stack itself chooses."""
    return {
        "AMD_DATA_DIR": str(folder.path),
        "AMD_STORAGE": state.storage,
        "AMD_RAY_DASHBOARD": state.dashboard,
        "AMD_RAY_TOKEN_FILE": str(folder.ray_token),
        "AMD_ADMIN_KEY_FILE": str(state.key_file),
        "AMD_HOST": HOST,
        "AMD_PORT": str(state.port),
        "AMD_SINGLE_MACHINE": "true",
        "AMD_SERVE_HOST": HOST,
        "AMD_SERVE_PORT": str(state.ray.serve),
    }


def changed_settings(folder: StackFolder, state: StackState) -> list[str]:
    """Return the user's settings in this process's environment that differ from those of the running control plane.

    Variables that are unset here are not compared, so that a stack can be used without repeating its settings.
    """
    process = state.alive("control-plane")
    try:
        running = process.environ() if process is not None else {}
    except psutil.Error:
        running = {}
    if not running:  # the process has ended or is just being started
        return []
    names = {f"AMD_{field}".upper() for field in Settings.model_fields} - _service_settings(folder, state).keys()
    wanted = _service_environment(folder, state)
    return sorted(name for name in names & os.environ.keys() if wanted[name] != running.get(name, ""))


def _ray_token(folder: StackFolder) -> dict[str, str]:
    """Return settings for Ray's token authentication, because Ray's defaults depend on earlier runs on this machine."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder.ray_token), "RAY_USAGE_STATS_ENABLED": "0"}


def _without(environment: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


# Probing


def find_problem(folder: StackFolder, state: StackState, part: Part) -> str | None:
    """Return the reason why a part is not ready, or None if it is ready."""
    try:
        if part == "control-plane":
            response = httpx.get(f"{state.url}/readyz", timeout=10.0)
            return None if response.is_success else f"/readyz returned status {response.status_code}"
        # The dashboard responds before any node is alive, and a node is alive before its agent accepts jobs.
        headers = {"Authorization": f"Bearer {folder.ray_token.read_text()}"}
        with httpx.Client(base_url=state.dashboard, headers=headers, timeout=10.0) as ray:
            ray.get("/api/jobs/").raise_for_status()
            nodes = ray.get("/api/v0/nodes", params={"detail": 1}).raise_for_status()
            if '"ALIVE"' not in nodes.text:
                return "no node is alive yet"
        return _agent_problem(state.ray.agent)
    except (httpx.HTTPError, OSError) as error:
        return f"does not respond: {error or type(error).__name__}"


def _agent_problem(port: int) -> str | None:
    """Probe the agent: if its port is taken, Ray 2.60 starts without the agent's HTTP server and cannot run jobs."""
    try:
        response = httpx.get(f"http://{HOST}:{port}/api/local_raylet_healthz", timeout=10.0)
        return None if response.is_success else f"the agent that accepts jobs returned status {response.status_code}"
    except httpx.HTTPError as error:
        return f"the agent that accepts jobs does not respond on port {port}: {error or type(error).__name__}"


def reports_of(state: StackState) -> dict[str, str]:
    """Return the readiness of the database, storage root and Ray, as reported by the control plane.

    The result is empty if the control plane is down.
    """
    try:
        parts: dict[str, str] = httpx.get(f"{state.url}/readyz", timeout=10.0).json()["parts"]
    except (httpx.HTTPError, json.JSONDecodeError, KeyError):
        return {}
    return parts
