"""Items to clips: threads that each drive a decoding process, first come, first served.

A process that a file crashes, hangs or fills is ended, named as the reason, and another stands ready before its thread
takes the next item. Knows nothing of encoders' weights or of requests.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from amd.artifacts.weights import Card
from amd.config import DataConfig, ViewsConfig
from amd.data.decoding.limits import FileLimits
from amd.data.decoding.reader import BadSample, SampleReader
from amd.device import use_threads
from amd.downstream.embedding.features import cut_clips, file_chooser
from service.inference.options import Item, Limits

logger = logging.getLogger(__name__)
MIB = 1 << 20


class Task(Protocol):
    """An item to be decoded for an encoder."""

    item: Item

    @property
    def card(self) -> Card: ...

    @property
    def views(self) -> ViewsConfig | None: ...

    @property
    def alive(self) -> bool:
        """Whether anybody still waits for it."""
        ...

    def decoded(self, clips: Tensor | Exception | None) -> None:
        """(V, 3, T, H, W) uint8; BadSample, or what else went wrong; None if it was dropped. From another thread."""
        ...


class Decoders:
    reader: type[SampleReader] = SampleReader

    def __init__(self, processes: int, limits: Limits) -> None:
        self._limits = limits
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._ready = [Future[None]() for _ in range(processes)]
        self.refused = 0
        """Items that could not be read."""
        self._threads = [
            threading.Thread(target=self._work, args=(ready,), name=f"decoder-{n}", daemon=True)
            for n, ready in enumerate(self._ready)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> list[Future[None]]:
        """Done as soon as each process has started once."""
        return self._ready

    def put(self, task: Task) -> None:
        self._tasks.put(task)

    def close(self) -> None:
        """End processes after the items they are at; those that wait are dropped."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, ready: Future[None]) -> None:
        use_threads(1)  # resizing must not take the model's cores
        limits = self._limits
        data = DataConfig(
            train="", read_timeout_s=limits.decode_timeout_s, read_memory_mib=limits.memory_mib, retries=1
        )
        most = FileLimits(
            limits.bytes_mib * MIB, limits.pixels, limits.frames, limits.duration_s, limits.decoded_mib * MIB
        )
        reader = self.reader(data, most)
        self._start(reader, ready)
        while (task := self._tasks.get()) is not None:
            if not task.alive:
                task.decoded(None)
                continue
            try:
                task.decoded(self._clips(reader, task))
            except Exception as error:  # a bad item, or no process: the thread goes on
                self.refused += isinstance(error, BadSample)
                task.decoded(error)
            del task  # its pixels would stay until the next
            self._start(reader, ready)  # where the item ended it, and no next one shall wait for that
        reader.close()

    def _clips(self, reader: SampleReader, task: Task) -> Tensor:
        content, uri = task.item
        frames = reader.read_file(
            uri or "the upload", file_chooser(task.card, task.views), content, self._limits.fetch_timeout_s
        )
        return cut_clips(frames, task.card, task.views)

    def _start(self, reader: SampleReader, ready: Future[None]) -> None:
        try:
            reader.start()
            if not ready.done():
                ready.set_result(None)
        except (RuntimeError, OSError) as error:
            logger.error("%s", error)  # tried again with the next item
            if not ready.done():
                ready.set_exception(error)
