"""Run the whole service on one machine: a Ray head and a control plane, in the background, on loopback.

`up` starts the parts that are down, with the same ports and data as before; `down` stops every process, including
Ray's, and keeps all data. `state` persists ports and processes, `processes` starts and probes each part, `supervisor`
restarts parts that die, and `shutdown` terminates them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from amd.storage import StorageError, check_writable, is_remote, local_path, resolve_root
from service.auth.uri_policy import UriPolicy
from service.settings import Settings
from service.stack.ports import free_ports, is_free
from service.stack.processes import changed_settings, find_problem, reports_of, start
from service.stack.shutdown import drain, end, end_leftovers
from service.stack.state import (
    STARTUP_S,
    SUPERVISED,
    Part,
    ProgressCallback,
    RayPorts,
    Stack,
    StackError,
    StackFolder,
    StackState,
    resolve_data_dir,
)

__all__ = [
    "DRAIN_S",
    "PartStatus",
    "Stack",
    "StackError",
    "StackStatus",
    "down",
    "find_stack",
    "status",
    "up",
]

RAY_TRIES = 5  # Ray allows its processes 30 s to start, which a cold or busy machine may exceed
DRAIN_S = 90.0  # time for running jobs to save a final checkpoint, whose own deadline is 60 s
LOG_TAIL = 2000

START_ORDER = SUPERVISED
STOP_ORDER: tuple[Part, ...] = ("supervisor", "control-plane", "ray")
"""In any other order, the supervisor would restart stopped parts, or the control plane would report a Ray failure."""


class PartStatus(NamedTuple):
    name: Part
    pid: int | None
    port: int
    health: str
    """`ok`, or a description of the problem."""


class StackStatus(NamedTuple):
    data_dir: Path
    url: str | None
    parts: list[PartStatus]
    reports: dict[str, str]
    """Readiness of the database, the storage root and Ray, as reported by the control plane."""
    supervisor: int | None = None
    """PID of the process that restarts parts that die; None if it is not running."""

    @property
    def healthy(self) -> bool:
        return bool(self.parts) and all(part.health == "ok" for part in self.parts)


def find_stack(data_dir: Path | None = None) -> Stack | None:
    """Find the running stack of a data directory. Raises StackError if its state cannot be read."""
    folder = StackFolder(resolve_data_dir(data_dir))
    state = folder.read()
    return folder.stack(state) if state is not None and state.alive("control-plane") else None


def up(
    data_dir: Path | None = None,
    *,
    port: int | None = None,
    storage: str | None = None,
    num_cpus: int | None = None,
    allowed: Sequence[str] | None = None,
    supervise: bool = False,
    on_progress: ProgressCallback = lambda line: None,
) -> Stack:
    """Start the parts that are down, and wait until all are ready. Raises StackError on failure.

    With `supervise`, a supervisor then restarts parts that die, until `down` is called.

    `port` defaults to the previous port, or else AMD_PORT; 0 selects any free port. `storage` defaults to the previous
    storage root, or else AMD_STORAGE. `num_cpus` is the number of CPUs that Ray offers to jobs. Default: all CPUs.
    `allowed` adds URI prefixes that jobs may read to the previous ones, which an empty text removes; those of
    AMD_ALLOWED_URIS apply too. If they change while the control plane is running, it is restarted.
    """
    folder = StackFolder(resolve_data_dir(data_dir))
    folder.prepare()
    with folder.lock():
        previous = folder.read()
        for part in START_ORDER:  # before choosing ports, which leftovers of a killed part may still use
            if previous is None or not previous.alive(part):
                end_leftovers(folder, previous, part)
        state = _plan_state(folder, port, storage, num_cpus, allowed)
        if changed := changed_settings(folder, previous or state):
            raise StackError(
                f"{', '.join(changed)}: the stack in {folder.path} is running with another value; run `amd down` first"
            )
        folder.write(state)
        control_plane = state.alive("control-plane")
        reason = _reason_to_restart(previous, state)
        if control_plane is not None and reason is not None:
            on_progress(f"restarting control-plane, because {reason}")
            end([control_plane])
        for part in START_ORDER:  # concurrently: neither needs the other to start
            if not state.alive(part):
                start(folder, state, part, on_progress)
        _wait_until_ready(folder, state, on_progress)
        if supervise and not state.alive("supervisor"):
            end_leftovers(folder, state, "supervisor")
            start(folder, state, "supervisor", on_progress)
        return folder.stack(state)


def down(
    data_dir: Path | None = None, *, drain_s: float = DRAIN_S, on_progress: ProgressCallback = lambda line: None
) -> bool:
    """Stop all parts, keeping their data. Returns whether any was running. Raises StackError on failure.

    Running jobs have `drain_s` seconds to save a final checkpoint, from which they continue after the next start.
    """
    folder = StackFolder(resolve_data_dir(data_dir))
    if not folder.path.is_dir():
        return False
    with folder.lock():
        state, ran = folder.read(), False
        for part in STOP_ORDER:
            process = state.alive(part) if state is not None else None
            if process is not None:
                if part == "ray" and drain_s > 0:
                    drain(folder, drain_s, on_progress)
                on_progress(f"stopping {part} (pid {process.pid})")
                end([process])
            ran |= end_leftovers(folder, state, part) or process is not None
        if state is not None:
            if state.ray_temp:
                shutil.rmtree(state.ray_temp, ignore_errors=True)
            folder.write(state.model_copy(update={"processes": {}, "ray_temp": None}))
        return ran


def status(data_dir: Path | None = None) -> StackStatus:
    """Probe each part. Raises StackError if the state cannot be read."""
    folder = StackFolder(resolve_data_dir(data_dir))
    state = folder.read()
    if state is None:
        return StackStatus(folder.path, None, [], {})
    parts, ports = [], {"ray": state.ray.dashboard, "control-plane": state.port}
    for part in START_ORDER:
        process = state.alive(part)
        problem = "down" if process is None else find_problem(folder, state, part)
        parts.append(PartStatus(part, process.pid if process else None, ports[part], problem or "ok"))
    supervisor = state.alive("supervisor")
    return StackStatus(folder.path, state.url, parts, reports_of(state), supervisor.pid if supervisor else None)


def _reason_to_restart(previous: StackState | None, state: StackState) -> str | None:
    """Return the reason why a running control plane must be restarted, if there is one."""
    if previous is not None and previous.ray != state.ray:
        return "another program has taken one of Ray's ports"
    if previous is not None and previous.allowed != state.allowed:
        return "jobs may read other locations now"
    return None


def _plan_state(
    folder: StackFolder,
    port: int | None,
    storage: str | None,
    num_cpus: int | None,
    allowed: Sequence[str] | None,
) -> StackState:
    """Return the previous state with the requested changes. Raises StackError if they would affect a running stack."""
    state, settings = folder.read(), Settings()
    if state is not None:
        requested = {
            "port": port or None,
            "storage": storage and resolve_root(storage),
            "num_cpus": num_cpus,
        }
        changes = {name: value for name, value in requested.items() if value not in (None, getattr(state, name))}
        if changes and any(state.alive(part) for part in START_ORDER):
            name, value = next(iter(changes.items()))
            raise StackError(
                f"{name.replace('_', '-')}: the stack in {folder.path} is running with {getattr(state, name)}, not "
                f"{value}; run `amd down` first"
            )
        state = state.model_copy(update=changes)
    else:
        chosen = free_ports(1 + len(RayPorts.model_fields))
        state = StackState(
            port=settings.port if port is None else port or chosen.pop(),
            storage=resolve_root(storage or settings.storage),
            num_cpus=num_cpus or os.cpu_count() or 1,
            ray=RayPorts(**dict(zip(RayPorts.model_fields, chosen, strict=False))),
            key_file=settings.admin_key_file or folder.path / "admin-key",
        )
    if allowed is not None:
        kept = () if "" in allowed else state.allowed
        state = state.model_copy(update={"allowed": tuple(dict.fromkeys((*kept, *_prefixes(state.storage, allowed))))})
    try:
        check_writable(state.storage)
    except StorageError as error:
        raise StackError(str(error)) from None
    if not state.alive("control-plane") and not is_free(state.port):
        raise StackError(
            f"port {state.port} is in use by another program; choose another with --port, "
            "or use --port 0 for any free port"
        )
    if not state.alive("ray"):
        # Users do not choose Ray's ports, so replace those that another program has taken since.
        ports = {name: port if is_free(port) else free_ports(1)[0] for name, port in state.ray}
        state = state.model_copy(update={"ray": RayPorts(**ports)})
    return state


def _prefixes(root: str, given: Sequence[str]) -> tuple[str, ...]:
    """Return URI prefixes with absolute paths. Raises StackError if one is invalid or a local one does not exist."""
    prefixes = tuple(text if is_remote(text) else str(local_path(text)) for text in given if text)
    for text in prefixes:
        if "," in text:
            raise StackError(f"allow: {text} contains a comma; use a link to the folder whose path contains none")
        if not is_remote(text) and not Path(text).exists():
            raise StackError(f"allow: {text} does not exist; check the path")
    try:
        UriPolicy(root, prefixes)
    except ValueError as error:
        raise StackError(f"allow: {error}") from None
    return prefixes


def _wait_until_ready(folder: StackFolder, state: StackState, on_progress: ProgressCallback) -> None:
    """Wait until all parts are ready. Raises StackError, with the log tail of the failed part, if one exits."""
    until, tries = time.monotonic() + STARTUP_S, RAY_TRIES
    for part in START_ORDER:
        while (problem := find_problem(folder, state, part)) is not None:
            if state.alive(part) is None:
                tries -= 1
                if part != "ray" or not tries:
                    raise StackError(f"{part} exited during startup:\n{_tail(folder.log(part))}")
                end_leftovers(folder, state, part)
                start(folder, state, part, on_progress)
            if time.monotonic() > until:
                raise StackError(
                    f"{part} is not ready after {STARTUP_S:.0f} s ({problem}); see {folder.log(part)}, then "
                    "run `amd down` and `amd up`"
                )
            time.sleep(0.25)
        on_progress(f"{part} is ready")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-LOG_TAIL:].strip()
