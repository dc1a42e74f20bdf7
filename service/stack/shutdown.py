"""How parts of a stack end: jobs after a last checkpoint, processes that are known, and what those left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import psutil  # type: ignore[import-untyped]

from service.stack.state import MARK, Folder, Part, Say, State

STOP_S = 15.0  # until a process that was asked to end is ended
DRIVER = "service.jobs.runner"
ASK_FIRST = (psutil.Process.terminate, psutil.Process.kill)


def drain(folder: Folder, seconds: float, say: Say) -> None:
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


def end_leftovers(folder: Folder, state: State | None, part: Part) -> bool:
    """End what a part has left behind; whether there was any."""
    temp = state.ray_temp if state is not None and part == "ray" else None
    found = [process for process in psutil.process_iter() if _belongs(process, f"{folder.mark}:{part}", temp)]
    end(found, (psutil.Process.kill,))
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


def end(processes: Sequence[psutil.Process], acts: Sequence[Callable[[psutil.Process], None]] = ASK_FIRST) -> None:
    """End processes: by each of these acts those that the one before has left."""
    for act in acts:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)
        _, processes = psutil.wait_procs(processes, timeout=STOP_S)
