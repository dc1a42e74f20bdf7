"""Dynamic batching on the model thread: group queued clips, in order of arrival, into batches for a single network.

An idle model waits briefly for clips that are being decoded. A busy model continues with the clips that arrived in the
meantime.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from amd.device import use_threads
from service.inference.model import InferencePlan, RequestedOutputs

STICKY_ERROR = "CUDA error"
"""Text in the message of errors after which a process can no longer use its GPU, such as an illegal memory access."""
SMOOTHING = 0.2  # weight of the newest batch in the throughput average


class Network(Protocol):
    """A network that processes clips: an encoder, or an encoder and its decoder with a mask."""

    tokens: int  # per clip
    device: torch.device

    def forward(self, clips: Sequence[Tensor], outputs: RequestedOutputs) -> Any:
        """Run clips as one batch. Returns without waiting for the GPU."""
        ...

    def collect(self, batch: Any) -> Sequence[Any]:
        """Wait for the device and return one result per clip."""
        ...

    def item_result(self, plan: InferencePlan, results: Sequence[Any]) -> dict[str, Any]:
        """Combine the results of an item's clips."""
        ...


class QueuedClip(Protocol):
    """A clip waiting for its network."""

    clip: Tensor  # (3, T, H, W) uint8
    outputs: RequestedOutputs

    @property
    def is_active(self) -> bool:
        """Whether a caller is still waiting for the result."""
        ...

    def on_dequeue(self, batch_fill: float) -> None:
        """Called when the clip leaves the queue for a batch, with the batch's fraction of the token budget."""
        ...


OnResults = Callable[[Sequence[tuple[QueuedClip, Any]]], None]  # a clip and its result, or an exception


class _InFlightBatch(NamedTuple):
    network: Network
    clips: list[QueuedClip]
    batch: Any
    began: float


class Batcher:
    """Runs queued clips through their networks on one thread."""

    def __init__(self, on_results: OnResults, max_tokens: int, max_wait_s: float, threads: int) -> None:
        """`on_results` is called on the model thread with each batch's clips and their results."""
        self._on_results, self._max_tokens, self._max_wait, self._threads = on_results, max_tokens, max_wait_s, threads
        self._queues: dict[Network, deque[tuple[float, QueuedClip]]] = {}
        self._expected: dict[Network, int] = {}
        self._callbacks: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._free_since = 0.0  # when the last batch finished
        self._problem = ""
        self.batches = self.clips = 0
        self.busy_s = 0.0
        self.tokens_per_s = 0.0
        """Moving average; 0 before the first batch."""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Reason why no further batch can succeed in this process; empty if there is none."""
        if not self._problem and not self._closed and not self._thread.is_alive():
            return "the model thread has ended"
        return self._problem

    def expect(self, network: Network, items: int) -> None:
        """Announce items whose clips will be queued later, with one `put` call per item."""
        with self._change:
            self._expected[network] = self._expected.get(network, 0) + items

    def put(self, network: Network, clips: Sequence[QueuedClip]) -> None:
        """Queue the clips of an expected item; pass an empty sequence if it could not be decoded."""
        now = time.monotonic()
        with self._change:
            self._expected[network] -= 1
            if not self._expected[network]:
                del self._expected[network]
            if clips:
                self._queues.setdefault(network, deque()).extend((now, clip) for clip in clips)
            self._change.notify()

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Run `function` on the model thread, between batches."""
        future: Future[None] = Future()
        with self._change:
            self._callbacks.append((function, future))
            self._change.notify()
        return future

    def close(self) -> None:
        """Stop after the current batch; queued clips are dropped."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            self._run_batches()
        except BaseException as error:
            self._problem = f"the model thread has ended: {type(error).__name__}: {error}"
            raise

    def _note_failure(self, error: Exception) -> None:
        if STICKY_ERROR in str(error) and not isinstance(error, torch.OutOfMemoryError):
            self._problem = f"the device failed: {str(error).splitlines()[0]}"

    def _run_batches(self) -> None:
        use_threads(self._threads)
        launched: _InFlightBatch | None = None
        while not self._closed:
            network, clips = self._next(wait=launched is None)
            next_batch = None if network is None or not clips else self._launch(network, clips)
            if launched is not None:
                self._collect(launched)  # after launching the next batch, so that a GPU does not idle in between
            launched = next_batch
            if launched is not None and launched.network.device.type == "cpu":  # the forward pass is synchronous
                self._collect(launched)
                launched = None

    def _next(self, wait: bool) -> tuple[Network | None, list[QueuedClip]]:
        """Return the next batch.

        Returns (None, []) after a callback, once closed, or if no clip is queued and `wait` is false.
        """
        with self._change:
            while not self._closed and not self._callbacks:
                network = self._oldest()
                if network is not None:
                    arrived = self._queues[network][0][0]
                    left = arrived + self._max_wait - time.monotonic()
                    idle = wait and arrived >= self._free_since
                    if not (idle and left > 0 and self._expected.get(network) and not self._full(network)):
                        return network, self._take(network)
                    self._change.wait(left)
                elif wait:
                    self._change.wait()
                else:
                    return None, []
            if self._closed:
                return None, []
            function, future = self._callbacks.popleft()
        try:
            function()
            future.set_result(None)
        except Exception as error:
            self._note_failure(error)
            future.set_exception(error)
        return None, []

    def _oldest(self) -> Network | None:
        """Return the network whose first clip has waited longest. Drops clips that no caller is waiting for."""
        for network, queue in list(self._queues.items()):
            while queue and not queue[0][1].is_active:
                queue.popleft()
            if not queue:
                del self._queues[network]
        return min(self._queues, key=lambda network: self._queues[network][0][0], default=None)

    def _full(self, network: Network) -> bool:
        return (len(self._queues[network]) + 1) * network.tokens > self._max_tokens

    def _take(self, network: Network) -> list[QueuedClip]:
        """Dequeue as many clips as the token budget allows, but at least one, in arrival order."""
        queue, clips = self._queues[network], list[QueuedClip]()
        while queue and (not clips or (len(clips) + 1) * network.tokens <= self._max_tokens):
            clip = queue.popleft()[1]
            if clip.is_active:
                clips.append(clip)
        for clip in clips:
            clip.on_dequeue(len(clips) * network.tokens / self._max_tokens)
        return clips

    def _launch(self, network: Network, clips: list[QueuedClip]) -> _InFlightBatch | None:
        outputs = [clip.outputs for clip in clips]
        union = RequestedOutputs(
            frozenset().union(*(each.layers for each in outputs)),
            any(each.tokens for each in outputs),
            any(each.logits for each in outputs),
        )
        began = time.monotonic()
        try:
            return _InFlightBatch(network, clips, network.forward([clip.clip for clip in clips], union), began)
        except Exception as error:  # such as running out of memory; only these clips fail
            self._note_failure(error)
            self._on_results([(clip, error) for clip in clips])
            return None

    def _collect(self, launched: _InFlightBatch) -> None:
        clips = launched.clips
        try:
            results: list[Any] = list(launched.network.collect(launched.batch))
        except Exception as error:
            self._note_failure(error)
            results = [error] * len(clips)
        self._free_since = time.monotonic()
        duration = self._free_since - launched.began
        speed = len(clips) * launched.network.tokens / max(duration, 1e-9)
        self.tokens_per_s += (speed - self.tokens_per_s) * (SMOOTHING if self.batches else 1.0)
        self.batches, self.clips, self.busy_s = self.batches + 1, self.clips + len(clips), self.busy_s + duration
        self._on_results(list(zip(clips, results, strict=True)))
