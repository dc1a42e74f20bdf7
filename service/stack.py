"""A whole service on one machine: a Ray head and a control plane, in the background, on loopback.

`<data_dir>/stack.json` holds their ports and processes. Starting finds what runs and starts what does not, on the same
ports and the same data; stopping leaves no process, of Ray's neither, and all data. A process is known by its pid
together with its start, so one that got the number of an old one is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import psutil  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError

from amd.storage import StorageError, check_writable, resolve_root, write_json
from service.settings import Settings

HOST = "127.0.0.1"
STARTUP_S = 600.0  # a cold or busy machine takes its time
RAY_TRIES = 5  # Ray gives its own parts half a minute, which a cold or busy machine may miss
LOCK_S = STARTUP_S + 60.0
STOP_S = 15.0  # until a process that was asked to end is ended
DRAIN_S = 90.0  # for the last checkpoints of running jobs: their own deadline is 60 s
DRIVER = "service.jobs.runner"
LOG_BYTES = 16 * 2**20  # a start puts a longer log aside
SAME_START_S = 2.0  # a start time is derived from the clock, which may be set meanwhile
OBJECT_STORE_MIB = 256  # clips never pass through it
LOG_TAIL = 2000
MARK = "AMD_STACK"  # in the environment of every process of a stack, and of all that those start

Part = Literal["control-plane", "ray"]
START_ORDER: tuple[Part, ...] = ("ray", "control-plane")
STOP_ORDER: tuple[Part, ...] = ("control-plane", "ray")  # the first would take the other's end for a failure
Say = Callable[[str], None]

NOT_FOR_JOBS = ("AMD_KEY", "AMD_KEY_FILE", "AMD_URL", "AMD_DATABASE_URL", "AMD_DATA_DIR", "RAY_AUTH_TOKEN")


class StackError(Exception):
    """The stack cannot be started or stopped as asked. The message has the reason and the remedy."""


class Process(BaseModel):
    pid: int
    started: float

    def find(self) -> psutil.Process | None:
        """The process, where it is still that one and alive."""
        try:
            found = psutil.Process(self.pid)
            if abs(found.create_time() - self.started) <= SAME_START_S and found.status() != psutil.STATUS_ZOMBIE:
                return found
        except psutil.NoSuchProcess:
            pass
        return None


class RayPorts(BaseModel):
    gcs: int
    dashboard: int
    agent: int
    metrics: int
    client: int
    serve: int


class State(BaseModel):
    """stack.json: what the next start finds again."""

    port: int
    storage: str
    num_cpus: int
    ray: RayPorts
    key_file: Path
    ray_temp: str | None = None
    processes: dict[Part, Process] = {}

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://{HOST}:{self.ray.dashboard}"

    def alive(self, part: Part) -> psutil.Process | None:
        known = self.processes.get(part)
        return known.find() if known is not None else None


class Stack(NamedTuple):
    """A stack that runs."""

    url: str
    key_file: Path
    data_dir: Path


class PartStatus(NamedTuple):
    name: Part
    pid: int | None
    port: int
    health: str
    """ok, or what is wrong."""


class Status(NamedTuple):
    data_dir: Path
    url: str | None
    parts: list[PartStatus]
    reports: dict[str, str]
    """What the control plane says of its database, its storage and Ray."""

    @property
    def healthy(self) -> bool:
        return bool(self.parts) and all(part.health == "ok" for part in self.parts)


def data_dir_of(given: Path | None) -> Path:
    """The folder of a stack: the one given, AMD_DATA_DIR, or the user's."""
    return (given or Settings().data_dir).expanduser().absolute()


def find_stack(data_dir: Path | None = None) -> Stack | None:
    """The stack that runs there."""
    folder = _Folder(data_dir_of(data_dir))
    state = folder.read()
    return folder.stack(state) if state is not None and state.alive("control-plane") else None


def up(
    data_dir: Path | None = None,
    *,
    port: int | None = None,
    storage: str | None = None,
    num_cpus: int | None = None,
    say: Say = lambda line: None,
) -> Stack:
    """Start what does not run yet, and wait until all of it is ready. Raises StackError.

    `port`: 0 for any that is free; none: the one of last time, else AMD_PORT. `storage`: as last time, else
    AMD_STORAGE's. `num_cpus`: what Ray offers to jobs; the machine's.
    """
    folder = _Folder(data_dir_of(data_dir))
    folder.prepare()
    with folder.lock():
        state = _planned(folder, port, storage, num_cpus)
        folder.write(state)
        for part in START_ORDER:  # side by side: neither needs the other to start
            if not state.alive(part):
                _end_leftovers(folder, state, part)
                _start(folder, state, part, say)
        _wait(folder, state, say)
        return folder.stack(state)


def down(data_dir: Path | None = None, *, drain_s: float = DRAIN_S, say: Say = lambda line: None) -> bool:
    """Stop all of it and keep its data; whether anything ran. Raises StackError.

    Running jobs get so long for a last checkpoint, from which they go on after the next start.
    """
    folder = _Folder(data_dir_of(data_dir))
    if not folder.path.is_dir():
        return False
    with folder.lock():
        state, ran = folder.read(), False
        for part in STOP_ORDER:
            process = state.alive(part) if state is not None else None
            if process is not None:
                if part == "ray" and drain_s > 0:
                    _drain(folder, drain_s, say)
                say(f"stopping {part} (pid {process.pid})")
                _end([process])
            ran |= _end_leftovers(folder, state, part) or process is not None
        if state is not None:
            if state.ray_temp:
                shutil.rmtree(state.ray_temp, ignore_errors=True)
            folder.write(state.model_copy(update={"processes": {}, "ray_temp": None}))
        return ran


def status(data_dir: Path | None = None) -> Status:
    folder = _Folder(data_dir_of(data_dir))
    state = folder.read()
    if state is None:
        return Status(folder.path, None, [], {})
    parts, ports = [], {"ray": state.ray.dashboard, "control-plane": state.port}
    for part in START_ORDER:
        process = state.alive(part)
        trouble = "down" if process is None else _trouble(folder, state, part)
        parts.append(PartStatus(part, process.pid if process else None, ports[part], trouble or "ok"))
    return Status(folder.path, state.url, parts, _reports(state))


class _Folder:
    """The data directory of a stack."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        self._state = path / "stack.json"
        self.ray_token = path / "ray-token"

    def prepare(self) -> None:
        """Make the folder, for its owner alone, and Ray's token in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.path / "logs").mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(self.ray_token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(32))
        except OSError as error:
            raise StackError(
                f"data directory {self.path}: cannot be written ({error.strerror}); choose another with --data-dir"
            ) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Alone at work on this stack; waits for whoever else is. A lock ends with its process, so none is ever stale.

        Raises StackError.
        """
        with (self.path / "stack.lock").open("a+") as file:
            until = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        file.seek(0)
                        raise StackError(
                            f"process {file.read().strip() or '?'} has been starting or stopping this stack for "
                            f"{LOCK_S:.0f} s; end it, and try again"
                        ) from None
                    time.sleep(0.2)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def read(self) -> State | None:
        try:
            return State.model_validate_json(self._state.read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise StackError(f"{self._state}: cannot be read ({reason}); remove it and start anew") from None

    def write(self, state: State) -> None:
        write_json(str(self._state), state.model_dump(mode="json"))

    def stack(self, state: State) -> Stack:
        return Stack(state.url, state.key_file, self.path)

    def log(self, part: Part) -> Path:
        return self.path / "logs" / f"{part}.log"


def _planned(folder: _Folder, port: int | None, storage: str | None, num_cpus: int | None) -> State:
    """What shall run: as last time but for what is asked otherwise. Raises StackError where that runs already."""
    state, settings = folder.read(), Settings()
    if state is not None:
        asked = {
            "port": port or None,
            "storage": storage and resolve_root(storage),
            "num_cpus": num_cpus,
        }
        changes = {name: value for name, value in asked.items() if value not in (None, getattr(state, name))}
        if changes and any(state.alive(part) for part in START_ORDER):
            name, value = next(iter(changes.items()))
            raise StackError(
                f"{name.replace('_', '-')}: the stack in {folder.path} runs with {getattr(state, name)}, not with "
                f"{value}; `amd down` first"
            )
        state = state.model_copy(update=changes)
    else:
        chosen = _free_ports(1 + len(RayPorts.model_fields))
        state = State(
            port=settings.port if port is None else port or chosen.pop(),
            storage=resolve_root(storage or settings.storage),
            num_cpus=num_cpus or os.cpu_count() or 1,
            ray=RayPorts(**dict(zip(RayPorts.model_fields, chosen, strict=False))),
            key_file=settings.admin_key_file or folder.path / "admin-key",
        )
    try:
        check_writable(state.storage)
    except StorageError as error:
        raise StackError(str(error)) from None
    if not state.alive("control-plane") and not _is_free(state.port):
        raise StackError(f"port {state.port} is taken by another program; choose one with --port, 0 for any")
    if not state.alive("ray"):
        # Ray's ports are nobody's choice: one that another program has taken meanwhile is replaced.
        ports = {name: port if _is_free(port) else _free_ports(1)[0] for name, port in state.ray}
        state = state.model_copy(update={"ray": RayPorts(**ports)})
    return state


# Starting


def _start(folder: _Folder, state: State, part: Part, say: Say) -> None:
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


def _ray_environment(folder: _Folder, state: State) -> dict[str, str]:
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


def _service_environment(folder: _Folder, state: State) -> dict[str, str]:
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


def _ray_token(folder: _Folder) -> dict[str, str]:
    """Explicit: what Ray does by itself depends on what ran on this machine before."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder.ray_token), "RAY_USAGE_STATS_ENABLED": "0"}


def _without(environment: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def _wait(folder: _Folder, state: State, say: Say) -> None:
    """Until all parts are ready. Raises StackError with the end of the log of one that is not."""
    until, tries = time.monotonic() + STARTUP_S, RAY_TRIES
    for part in START_ORDER:
        while (trouble := _trouble(folder, state, part)) is not None:
            if state.alive(part) is None:
                tries -= 1
                if part != "ray" or not tries:
                    raise StackError(f"{part} ended while it started:\n{_tail(folder.log(part))}")
                _end_leftovers(folder, state, part)
                _start(folder, state, part, say)
            if time.monotonic() > until:
                raise StackError(
                    f"{part} is not ready after {STARTUP_S:.0f} s ({trouble}); see {folder.log(part)}, then "
                    "`amd down` and `amd up`"
                )
            time.sleep(0.25)
        say(f"{part} is ready")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-LOG_TAIL:].strip()


# Looking


def _trouble(folder: _Folder, state: State, part: Part) -> str | None:
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
        return None if '"ALIVE"' in nodes.text else "no node is alive yet"
    except (httpx.HTTPError, OSError) as error:
        return f"it does not answer: {error or type(error).__name__}"


def _reports(state: State) -> dict[str, str]:
    try:
        parts: dict[str, str] = httpx.get(f"{state.url}/readyz", timeout=10.0).json()["parts"]
    except (httpx.HTTPError, json.JSONDecodeError, KeyError):
        return {}
    return parts


# Stopping


def _drain(folder: _Folder, seconds: float, say: Say) -> None:
    """Ask the drivers of jobs to end. Their owners did not, so the jobs are queued again after the next start."""
    mark = f"{folder.mark}:ray"
    drivers = [process for process in psutil.process_iter() if _is_driver(process) and _belongs(process, mark, None)]
    if drivers:
        say(f"{len(drivers)} jobs save a last checkpoint" if len(drivers) > 1 else "a job saves a last checkpoint")
    for driver in drivers:
        with contextlib.suppress(psutil.NoSuchProcess):
            driver.terminate()
    psutil.wait_procs(drivers, timeout=seconds)


def _is_driver(process: psutil.Process) -> bool:
    try:
        return bool(process.cmdline()[1:3] == ["-m", DRIVER])  # the shell that Ray starts it in would die at once
    except psutil.Error:
        return False


def _end_leftovers(folder: _Folder, state: State | None, part: Part) -> bool:
    """End what a part has left behind; whether there was any."""
    temp = state.ray_temp if state is not None and part == "ray" else None
    found = [process for process in psutil.process_iter() if _belongs(process, f"{folder.mark}:{part}", temp)]
    _end(found, (psutil.Process.kill,))
    return bool(found)


def _belongs(process: psutil.Process, mark: str, temp: str | None) -> bool:
    """Whether it carries the mark; of Ray also whether it writes below its folder: its workers' titles overwrite their
    environment."""
    try:
        if process.pid == os.getpid():
            return False
        if process.environ().get(MARK) == mark:
            return True
        if temp is None or not process.name().startswith("ray"):
            return False
        return any(file.path.startswith(f"{temp}/") for file in process.open_files())
    except (psutil.Error, OSError):  # ended meanwhile, or another user's
        return False


ASK_FIRST = (psutil.Process.terminate, psutil.Process.kill)


def _end(processes: Sequence[psutil.Process], acts: Sequence[Callable[[psutil.Process], None]] = ASK_FIRST) -> None:
    """End processes: by each of these acts those that the one before has left."""
    for act in acts:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)
        _, processes = psutil.wait_procs(processes, timeout=STOP_S)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    """Free ports outside 10002-19999, where Ray's own workers listen."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            probe.bind((HOST, 0))
            port: Any = probe.getsockname()[1]
            if port > 20_000:
                ports.append(port)
    return ports
