"""Terminate a stack: first its job drivers, which save a final checkpoint, then known processes, then any leftovers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import psutil  # type: ignore[import-untyped]

from service.stack.state import MARK, Part, ProgressCallback, StackFolder, StackState

TERMINATE_S = 15.0  # time until a process that ignores SIGTERM is killed
DRIVER = "service.jobs.runner"
TERMINATE_THEN_KILL = (psutil.Process.terminate, psutil.Process.kill)


def drain(folder: StackFolder, seconds: float, on_progress: ProgressCallback) -> None:
    """Terminate job drivers, which then save a final checkpoint. Their jobs are requeued after the next start."""
    mark = f"{folder.mark}:ray"
    drivers = [process for process in psutil.process_iter() if _is_driver(process) and _belongs(process, mark, None)]
    if drivers:
        on_progress(
            f"{len(drivers)} jobs are saving a final checkpoint"
            if len(drivers) > 1
            else "a job is saving a final checkpoint"
        )
    for driver in drivers:
        with contextlib.suppress(psutil.NoSuchProcess):
            driver.terminate()
    psutil.wait_procs(drivers, timeout=seconds)


def _is_driver(process: psutil.Process) -> bool:
    try:
        # Does not match the driver's parent shell, which would exit immediately.
        return bool(process.cmdline()[1:3] == ["-m", DRIVER])
    except psutil.Error:
        return False


def end_leftovers(folder: StackFolder, state: StackState | None, part: Part) -> bool:
    """Kill a part's remaining processes. Returns whether there were any."""
    temp = state.ray_temp if state is not None and part == "ray" else None
    found = [process for process in psutil.process_iter() if _belongs(process, f"{folder.mark}:{part}", temp)]
    end(found, (psutil.Process.kill,))
    return bool(found)


def _belongs(process: psutil.Process, mark: str, temp: str | None) -> bool:
    """Whether a process has the part's mark in its environment, or belongs to Ray and has files open in `temp`.

    Ray's workers overwrite their environment when they set their process title, so they need the second check.
    """
    try:
        if process.pid == os.getpid():
            return False
        if process.environ().get(MARK) == mark:
            return True
        if temp is None or not process.name().startswith("ray"):
            return False
        return any(file.path.startswith(f"{temp}/") for file in process.open_files())
    except (psutil.Error, OSError):  # already ended, or owned by another user
        return False


def end(
    processes: Sequence[psutil.Process],
    signals: Sequence[Callable[[psutil.Process], None]] = TERMINATE_THEN_KILL,
) -> None:
    """Terminate processes: send the signals in turn, each only to processes that survived the previous one."""
    for send in signals:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(process)
        _, processes = psutil.wait_procs(processes, timeout=TERMINATE_S)
