"""Decoder pool: threads that each drive one decoding process and take items from a common queue.

A process that crashes, hangs or runs out of memory on a file is replaced before its thread takes the next item, and the
item's error reports the cause.
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
from service.inference.options import Item, RequestLimits

logger = logging.getLogger(__name__)
MIB = 1 << 20


class DecodeTask(Protocol):
    """An item to decode for an encoder."""

    item: Item

    @property
    def card(self) -> Card: ...

    @property
    def views(self) -> ViewsConfig | None: ...

    @property
    def is_active(self) -> bool:
        """Whether a caller is still waiting for the clips."""
        ...

    def on_decoded(self, clips: Tensor | Exception | None) -> None:
        """Handle the result: clips (V, 3, T, H, W) uint8; an error; or None if the item was dropped.

        Called on a decoder thread.
        """
        ...


class DecoderPool:
    """Decodes items in a fixed number of child processes."""

    reader: type[SampleReader] = SampleReader

    def __init__(self, processes: int, limits: RequestLimits) -> None:
        self._limits = limits
        self._tasks: queue.SimpleQueue[DecodeTask | None] = queue.SimpleQueue()
        self._ready = [Future[None]() for _ in range(processes)]
        self.rejected_items = 0
        """Number of items that could not be read."""
        self._threads = [
            threading.Thread(target=self._work, args=(ready,), name=f"decoder-{n}", daemon=True)
            for n, ready in enumerate(self._ready)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> list[Future[None]]:
        """Futures, one per process, that complete once the process has started."""
        return self._ready

    def put(self, task: DecodeTask) -> None:
        self._tasks.put(task)

    def close(self) -> None:
        """Stop the processes once their current items are decoded; queued items are dropped."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, ready: Future[None]) -> None:
        use_threads(1)  # leave the other cores to the model
        limits = self._limits
        data = DataConfig(
            train="",
            read_timeout_s=limits.decode_timeout_s,
            read_memory_mib=limits.memory_mib,
            retries=1,
            damage="strict",  # a response cannot say which part of an upload it describes
        )
        file_limits = FileLimits(
            limits.bytes_mib * MIB, limits.pixels, limits.frames, limits.duration_s, limits.decoded_mib * MIB
        )
        reader = self.reader(data, file_limits)
        self._start(reader, ready)
        while (task := self._tasks.get()) is not None:
            if not task.is_active:
                task.on_decoded(None)
                continue
            try:
                task.on_decoded(self._clips(reader, task))
            except Exception as error:  # a bad item or a failed process must not end the thread
                self.rejected_items += isinstance(error, BadSample)
                task.on_decoded(error)
            del task  # otherwise its pixels stay in memory until the next item
            self._start(reader, ready)  # replace the process now if the item crashed it
        reader.close()

    def _clips(self, reader: SampleReader, task: DecodeTask) -> Tensor:
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
            logger.error("%s", error)  # retried with the next item
            if not ready.done():
                ready.set_exception(error)
