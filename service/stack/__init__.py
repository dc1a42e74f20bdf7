"""A whole service on one machine: a Ray head and a control plane, in the background, on loopback.

Starting finds what runs and starts what does not, on the same ports and the same data; stopping leaves no process, of
Ray's neither, and all data. `state` is what is remembered, `parts` starts each part and asks how it is, `ending` ends.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from amd.storage import StorageError, check_writable, resolve_root
from service.settings import Settings
from service.stack.parts import reports_of, start, trouble_of
from service.stack.ports import free_ports, is_free
from service.stack.shutdown import drain, end, end_leftovers
from service.stack.state import (
    STARTUP_S,
    Folder,
    Part,
    RayPorts,
    Say,
    Stack,
    StackError,
    State,
    data_dir_of,
)

__all__ = [
    "DRAIN_S",
    "PartStatus",
    "Stack",
    "StackError",
    "Status",
    "down",
    "find_stack",
    "status",
    "up",
]

RAY_TRIES = 5  # Ray gives its own parts half a minute, which a cold or busy machine may miss
DRAIN_S = 90.0  # for the last checkpoints of running jobs: their own deadline is 60 s
LOG_TAIL = 2000

START_ORDER: tuple[Part, ...] = ("ray", "control-plane")
STOP_ORDER: tuple[Part, ...] = ("control-plane", "ray")  # the first would take the other's end for a failure


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


def find_stack(data_dir: Path | None = None) -> Stack | None:
    """The stack that runs there. Raises StackError where what is remembered cannot be read."""
    folder = Folder(data_dir_of(data_dir))
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
    folder = Folder(data_dir_of(data_dir))
    folder.prepare()
    with folder.lock():
        state = _planned(folder, port, storage, num_cpus)
        folder.write(state)
        for part in START_ORDER:  # side by side: neither needs the other to start
            if not state.alive(part):
                end_leftovers(folder, state, part)
                start(folder, state, part, say)
        _wait(folder, state, say)
        return folder.stack(state)


def down(data_dir: Path | None = None, *, drain_s: float = DRAIN_S, say: Say = lambda line: None) -> bool:
    """Stop all of it and keep its data; whether anything ran. Raises StackError.

    Running jobs get so long for a last checkpoint, from which they go on after the next start.
    """
    folder = Folder(data_dir_of(data_dir))
    if not folder.path.is_dir():
        return False
    with folder.lock():
        state, ran = folder.read(), False
        for part in STOP_ORDER:
            process = state.alive(part) if state is not None else None
            if process is not None:
                if part == "ray" and drain_s > 0:
                    drain(folder, drain_s, say)
                say(f"stopping {part} (pid {process.pid})")
                end([process])
            ran |= end_leftovers(folder, state, part) or process is not None
        if state is not None:
            if state.ray_temp:
                shutil.rmtree(state.ray_temp, ignore_errors=True)
            folder.write(state.model_copy(update={"processes": {}, "ray_temp": None}))
        return ran


def status(data_dir: Path | None = None) -> Status:
    """How each part is, and what the control plane says of others. Raises StackError as `find_stack` does."""
    folder = Folder(data_dir_of(data_dir))
    state = folder.read()
    if state is None:
        return Status(folder.path, None, [], {})
    parts, ports = [], {"ray": state.ray.dashboard, "control-plane": state.port}
    for part in START_ORDER:
        process = state.alive(part)
        trouble = "down" if process is None else trouble_of(folder, state, part)
        parts.append(PartStatus(part, process.pid if process else None, ports[part], trouble or "ok"))
    return Status(folder.path, state.url, parts, reports_of(state))


def _planned(folder: Folder, port: int | None, storage: str | None, num_cpus: int | None) -> State:
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
        chosen = free_ports(1 + len(RayPorts.model_fields))
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
    if not state.alive("control-plane") and not is_free(state.port):
        raise StackError(f"port {state.port} is taken by another program; choose one with --port, 0 for any")
    if not state.alive("ray"):
        # Ray's ports are nobody's choice: one that another program has taken meanwhile is replaced.
        ports = {name: port if is_free(port) else free_ports(1)[0] for name, port in state.ray}
        state = state.model_copy(update={"ray": RayPorts(**ports)})
    return state


def _wait(folder: Folder, state: State, say: Say) -> None:
    """Until all parts are ready. Raises StackError with the end of the log of one that is not."""
    until, tries = time.monotonic() + STARTUP_S, RAY_TRIES
    for part in START_ORDER:
        while (trouble := trouble_of(folder, state, part)) is not None:
            if state.alive(part) is None:
                tries -= 1
                if part != "ray" or not tries:
                    raise StackError(f"{part} ended while it started:\n{_tail(folder.log(part))}")
                end_leftovers(folder, state, part)
                start(folder, state, part, say)
            if time.monotonic() > until:
                raise StackError(
                    f"{part} is not ready after {STARTUP_S:.0f} s ({trouble}); see {folder.log(part)}, then "
                    "`amd down` and `amd up`"
                )
            time.sleep(0.25)
        say(f"{part} is ready")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-LOG_TAIL:].strip()
