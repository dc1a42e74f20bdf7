"""Start and stop loader processes, and check that shared memory suffices, which torch's DataLoader does not.

See loader.py for why the processes are started by a fork server.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from amd.config import ConfigError, DataConfig
from amd.data.loading.stack_traces import dump_on_signal

SHARED_MEMORY = "/dev/shm"


def fork_server(*heavy: str) -> ForkServerContext:
    """Return the multiprocessing context for loader processes; the first call starts the server, which imports torch.

    `heavy`: additional modules to preload, if the server has not started yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["amd.data.loading.loader", *heavy])
    with hide_main_module():
        _start_server()
    return context


def _start_server() -> None:
    from multiprocessing import forkserver

    forkserver.ensure_running()


@contextmanager
def hide_main_module() -> Iterator[None]:
    """Prevent multiprocessing from importing the user's main script in the processes that it starts.

    Loader processes do not need it; otherwise every training script would need an `if __name__ == "__main__"` guard,
    and every loader process of a Ray worker would import Ray.
    """
    main = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def init_worker(environ: Mapping[str, str], worker: int) -> None:
    """Initialise a loader process with the current environment, which may be newer than the fork server's."""
    os.environ.clear()
    os.environ.update(environ)
    dump_on_signal()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process handles Ctrl-C and stops this one
    threading.Thread(target=_exit_with_training, daemon=True).start()


def _exit_with_training() -> None:
    """Exit when the training process dies. torch only watches the parent, which is the fork server."""
    training = multiprocessing.parent_process()
    assert training is not None
    training.join()
    os._exit(1)


def empty_uint8(*shape: int) -> Tensor:
    """Allocate a uint8 tensor, in shared memory if called in a loader process, so that it is sent without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape))  # as in torch's default collate
    return torch.empty(0, dtype=torch.uint8).set_(storage).reshape(shape)


def check_shared_memory(data: DataConfig, micro_batch: int, clips: int, clip_bytes: int, ranks: int = 1) -> None:
    """Raise ConfigError if prefetched clips exceed shared memory, which would kill a loader process with a bus error.

    `clips`: clips per sample, i.e. data.repeats or the number of test views. `ranks`: training workers that share the
    memory.
    """
    if not os.path.isdir(SHARED_MEMORY):
        return
    need = ranks * data.loader_workers * data.prefetch_batches * micro_batch * clips * clip_bytes
    size = shutil.disk_usage(SHARED_MEMORY).total
    if need > size:
        shared = f", for {ranks} training workers on this node," if ranks > 1 else ""
        raise ConfigError(
            [
                f"data.loader_workers={data.loader_workers} x data.prefetch_batches={data.prefetch_batches} "
                f"micro-batches of {micro_batch} samples x {clips} clips of each{shared} take {need >> 20} MiB of "
                f"shared memory, but {SHARED_MEMORY} has {size >> 20} MiB: lower these settings or "
                "scaling.micro_batch, or enlarge shared memory (docker run --shm-size, a memory volume in Kubernetes)"
            ]
        )


def shared_memory_id() -> str:
    """Return an identifier for this machine's shared memory, or the container's if it has its own."""
    device = os.stat(SHARED_MEMORY).st_dev if os.path.isdir(SHARED_MEMORY) else 0
    return f"{socket.gethostname()}/{device}"


def is_worker_death(error: RuntimeError) -> bool:
    """Return whether torch reports the death of a loader process rather than an exception in it."""
    return "exited unexpectedly" in str(error) or "is killed by signal" in str(error)


def worker_pids(loader: DataLoader[Any]) -> list[int]:
    """Return the IDs of a loader's processes; empty before the first batch."""
    return [worker.pid for worker in getattr(loader._iterator, "_workers", [])]


def stop_workers(loader: DataLoader[Any]) -> None:
    """Stop a loader's processes immediately rather than when torch's iterator is garbage collected."""
    iterator: Any = loader._iterator
    if iterator is None:
        return
    iterator._shutdown_workers()
    for worker in getattr(iterator, "_workers", []):
        if worker.is_alive():
            worker.kill()
