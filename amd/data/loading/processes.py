"""The processes that read: how they start, what they share, how they end. What torch's DataLoader leaves to its user.

Knows nothing of samples. See loader.py for why they come from a fork server.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
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

SHARED_MEMORY = "/dev/shm"


def fork_server(*heavy: str) -> ForkServerContext:
    """The context of reading processes; the first call lets the server start to import torch in the background.

    `heavy`: modules that it imports too, if it has not started yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["amd.data.loading.loader", *heavy])
    with main_hidden():
        _start_server()
    return context


def _start_server() -> None:
    from multiprocessing import forkserver

    forkserver.ensure_running()


@contextmanager
def main_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the user's main script again in each process it starts.

    They need nothing of it, and it would ask every script that trains for an `if __name__ == "__main__"`, and every
    reading process of a Ray worker to import Ray.
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


def enter(environ: Mapping[str, str], worker: int) -> None:
    """First thing in a reading process. The server may be older than the environment: credentials, endpoints."""
    os.environ.clear()
    os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which then ends this one
    threading.Thread(target=_end_with_training, daemon=True).start()


def _end_with_training() -> None:
    """A reading process is the fork server's child: torch, which watches its parent, would not see training die."""
    training = multiprocessing.parent_process()
    assert training is not None
    training.join()
    os._exit(1)


def empty_bytes(*shape: int) -> Tensor:
    """A uint8 tensor to be filled; in a reading process in shared memory, so that it is sent without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).reshape(shape)


def check_shared_memory(data: DataConfig, micro_batch: int, clips: int, clip_bytes: int) -> None:
    """Raise ConfigError if what is read ahead cannot fit: a process that runs out of it dies of a bus error.

    `clips` of each sample: data.repeats, or the views of a test.
    """
    if not os.path.isdir(SHARED_MEMORY):
        return
    need = data.loader_workers * data.prefetch_batches * micro_batch * clips * clip_bytes
    size = shutil.disk_usage(SHARED_MEMORY).total
    if need > size:
        raise ConfigError(
            [
                f"data.loader_workers={data.loader_workers} x data.prefetch_batches={data.prefetch_batches} "
                f"micro-batches of {micro_batch} samples x {clips} clips of each take {need >> 20} MiB of shared "
                f"memory, and {SHARED_MEMORY} has {size >> 20} MiB: lower them or scaling.micro_batch, or enlarge it "
                "(docker run --shm-size, a memory volume in Kubernetes)"
            ]
        )


def is_death(error: RuntimeError) -> bool:
    """Whether torch says that a reading process died, rather than that our code failed in it."""
    return "exited unexpectedly" in str(error) or "is killed by signal" in str(error)


def stop(loader: DataLoader[Any]) -> None:
    """End a loader's processes: what torch does when its iterator is collected, at a time of our choosing."""
    iterator: Any = loader._iterator
    if iterator is None:
        return
    iterator._shutdown_workers()
    for worker in getattr(iterator, "_workers", []):
        if worker.is_alive():
            worker.kill()
