"""Tests for the stack supervisor, which kill real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service.stack import down, status
from service.stack.ports import free_ports
from service.stack.processes import start
from service.stack.state import MARK, Part, PartProcess, ProgressCallback, RayPorts, StackFolder, StackState
from service.stack.supervisor import MAX_PAUSE_S, STEADY_S, RestartPauses, Supervisor, rotate
from tests.support.service.control_plane import wait_for

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StackFolder]:
    folder = StackFolder(tmp_path / "data")
    folder.prepare()
    yield folder
    state = read(folder)
    if (supervisor := state.processes.get("supervisor")) is not None and supervisor.pid == os.getpid():
        del state.processes["supervisor"]  # `down` would end this process
        folder.write(state)
    down(folder.path, drain_s=0)


def write_state(folder: StackFolder) -> StackState:
    """Write the state of a stack that this process supervises."""
    ports = free_ports(1 + len(RayPorts.model_fields))
    state = StackState(
        port=ports.pop(),
        storage=str(folder.path / "root"),
        num_cpus=1,
        ray=RayPorts(**dict(zip(RayPorts.model_fields, ports, strict=True))),
        key_file=folder.path / "admin-key",
    )
    own = psutil.Process()
    state.processes["supervisor"] = PartProcess(pid=own.pid, started=own.create_time())
    folder.write(state)
    return state


def start_sleeper(folder: StackFolder, state: StackState, part: Part, on_progress: ProgressCallback) -> None:
    environment = {**os.environ, MARK: f"{folder.mark}:{part}"}
    process = subprocess.Popen(SLEEP, env=environment, start_new_session=True)
    state.processes[part] = PartProcess(pid=process.pid, started=psutil.Process(process.pid).create_time())
    folder.write(state)


def read(folder: StackFolder) -> StackState:
    state = folder.read()
    assert state is not None
    return state


def kill(folder: StackFolder, part: Part) -> int:
    process = read(folder).alive(part)
    assert process is not None
    process.kill()
    wait_for(lambda: read(folder).alive(part) is None)
    return int(process.pid)


def test_a_killed_part_is_restarted_with_growing_pauses(folder: StackFolder) -> None:
    state, now = write_state(folder), 1000.0
    start_sleeper(folder, state, "control-plane", print)
    supervisor = Supervisor(folder, start_sleeper, clock=lambda: now)
    supervisor.step()
    pid = kill(folder, "control-plane")
    assert supervisor.step()
    restarted = read(folder).alive("control-plane")
    assert restarted is not None
    assert restarted.pid != pid
    kill(folder, "control-plane")
    supervisor.step()
    assert read(folder).alive("control-plane") is None, "the second restart is preceded by a pause"
    now += 1.0
    supervisor.step()
    assert read(folder).alive("control-plane") is not None
    assert "ray" not in read(folder).processes, "only parts that were started are restarted"


def test_pauses_grow_up_to_a_limit_and_are_reset_once_a_part_is_steady() -> None:
    pauses, now, waited = RestartPauses(), 0.0, []
    for _ in range(9):
        began = now
        while not pauses.is_over(now):
            now += 1.0
        waited.append(now - began)
        pauses.note_restart(now)
    assert waited == [0, 1, 2, 4, 8, 16, 32, MAX_PAUSE_S, MAX_PAUSE_S]
    now += STEADY_S + MAX_PAUSE_S + 1
    assert pauses.is_over(now)
    pauses.note_restart(now)
    assert pauses.is_over(now + 1)


def test_nothing_is_restarted_while_another_process_starts_or_stops_the_stack(folder: StackFolder) -> None:
    state = write_state(folder)
    start_sleeper(folder, state, "control-plane", print)
    kill(folder, "control-plane")
    supervisor = Supervisor(folder, start_sleeper)
    with folder.lock():
        assert supervisor.step()
        assert read(folder).alive("control-plane") is None
    supervisor.step()
    assert read(folder).alive("control-plane") is not None


def test_a_supervisor_ends_once_it_is_replaced_or_stopped(folder: StackFolder) -> None:
    state = write_state(folder)
    supervisor = Supervisor(folder, start_sleeper)
    assert supervisor.step()
    start_sleeper(folder, state, "supervisor", print)
    assert not supervisor.step()
    down(folder.path, drain_s=0)
    assert not supervisor.step()


def test_a_log_is_rotated_while_a_process_writes_to_it(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    code = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    with (
        log.open("ab") as file,
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=file, text=True) as writer,
    ):
        assert writer.stdin is not None

        def write(line: str) -> Callable[[], bool]:
            writer.stdin.write(line + "\n")  # type: ignore[union-attr]
            writer.stdin.flush()  # type: ignore[union-attr]
            return lambda: line in log.read_text()

        wait_for(write("first" * 100))
        rotate(log, limit=1000)
        assert not log.with_suffix(".log.1").exists()
        rotate(log, limit=100)
        assert "first" in log.with_suffix(".log.1").read_text()
        wait_for(write("second"))
        assert log.read_text() == "second\n", "the process continues at the start of the file"
        writer.stdin.close()


@pytest.mark.slow
def test_a_supervisor_process_restarts_a_part_until_the_stack_is_stopped(folder: StackFolder) -> None:
    state = write_state(folder)
    for part in ("control-plane", "supervisor"):
        start(folder, state, part, print)
    supervisor = read(folder).alive("supervisor")
    assert supervisor is not None
    assert status(folder.path).supervisor == supervisor.pid
    kill(folder, "control-plane")
    wait_for(lambda: read(folder).alive("control-plane") is not None, 300)
    restarted = read(folder).alive("control-plane")
    assert restarted is not None
    assert down(folder.path, drain_s=0)
    assert not supervisor.is_running() or supervisor.status() == psutil.STATUS_ZOMBIE
    assert not restarted.is_running()
