"""Child processes for tests, forked from a server that has already imported torch (one per pytest process).

A new Python process takes seconds to import torch; a fork of the server takes milliseconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any, TypeVar

from amd.data.loading.processes import fork_server, hide_main_module

T = TypeVar("T")
FAILURE_GRACE_S = 30.0
# Imported by the server if its first user is a function of this module.
PRELOADED = (
    "tests.support.runs.tiny_runs",
    "amd.training.runs.launch",
    "amd.downstream.supervised.worker",
    "torch._dynamo",  # which optimizers import
)


def run_in_subprocess(function: Callable[..., T], *args: Any) -> T:
    """Run `function(*args)` in the main thread of a new process, so that it receives signals.

    Use this for Ray drivers: if Ray's core kills its process, one test fails instead of the whole session.
    """
    with hide_main_module(), ProcessPoolExecutor(1, mp_context=fork_server(*PRELOADED)) as pool:
        return pool.submit(_call, dict(os.environ), function, args).result()


def run_ranks(function: Callable[..., object], ranks: Iterable[tuple[Any, ...]]) -> list[int | None]:
    """Call the function concurrently, once for each tuple of arguments, with a separate process for each call.

    Returns the exit codes. After a process has failed, the remaining processes have FAILURE_GRACE_S to exit and are
    then killed, as torchrun and Ray Train do. Otherwise, with gloo, two ranks could wait for each other forever after
    all other ranks have exited.
    """
    context = fork_server(*PRELOADED)
    processes = [context.Process(target=_call, args=(dict(os.environ), function, args)) for args in ranks]
    with hide_main_module():
        for process in processes:
            process.start()
    running = list(processes)
    while running and not any(process.exitcode for process in processes):
        wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
    deadline = time.monotonic() + FAILURE_GRACE_S
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _call(environ: Mapping[str, str], function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Call a function with the test's environment, which may have changed since the server started."""
    os.environ.clear()
    os.environ.update(environ)
    return function(*args)
