"""The model's thread: clips of all requests in order, put together into batches of one network each.

An idle model waits a moment for clips that are being decoded; one that was busy takes what has come meanwhile. Knows
nothing of items, files or HTTP.
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
from service.inference.model import Outputs, Plan

SMOOTHING = 0.2  # share of the newest batch in the measured speed


class Network(Protocol):
    """What clips go through: an encoder, or one with its decoder behind a mask."""

    tokens: int  # of a clip
    device: torch.device

    def forward(self, clips: Sequence[Tensor], outputs: Outputs) -> Any:
        """Clips as one batch. On a GPU it returns before the device is done."""
        ...

    def collect(self, batch: Any) -> Sequence[Any]:
        """Wait for the device; what became of each clip."""
        ...

    def finish(self, plan: Plan, seen: Sequence[Any]) -> dict[str, Any]:
        """An item's answer, out of what became of its clips."""
        ...


class Row(Protocol):
    """One clip that waits for its network."""

    clip: Tensor  # (3, T, H, W) uint8
    outputs: Outputs

    @property
    def alive(self) -> bool:
        """Whether anybody still waits for it."""
        ...

    def taken(self) -> None:
        """It leaves the queue for a batch."""
        ...


Deliver = Callable[[Sequence[tuple[Row, Any]]], None]  # what became of a row, or an exception


class _Launched(NamedTuple):
    network: Network
    rows: list[Row]
    batch: Any
    began: float


class Batcher:
    def __init__(self, deliver: Deliver, max_tokens: int, max_wait_s: float, threads: int) -> None:
        """`deliver` is handed what became of each row, in the model's thread."""
        self._deliver, self._max_tokens, self._max_wait, self._threads = deliver, max_tokens, max_wait_s, threads
        self._lanes: dict[Network, deque[tuple[float, Row]]] = {}
        self._coming: dict[Network, int] = {}
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._free_since = 0.0  # when the last batch was done
        self.batches = self.rows = 0
        self.busy_s = 0.0
        self.tokens_per_s = 0.0
        """Of late; 0 before the first batch."""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def expect(self, network: Network, items: int) -> None:
        """So many items are on their way, to be `put` one by one."""
        with self._change:
            self._coming[network] = self._coming.get(network, 0) + items

    def put(self, network: Network, rows: Sequence[Row]) -> None:
        """The clips of one item that was expected; none, if it turned out to have none."""
        now = time.monotonic()
        with self._change:
            self._coming[network] -= 1
            if not self._coming[network]:
                del self._coming[network]
            if rows:
                self._lanes.setdefault(network, deque()).extend((now, row) for row in rows)
            self._change.notify()

    def call(self, act: Callable[[], None]) -> Future[None]:
        """Run `act` in the model's thread, between two batches."""
        future: Future[None] = Future()
        with self._change:
            self._calls.append((act, future))
            self._change.notify()
        return future

    def close(self) -> None:
        """Stop after the batch that runs; rows that wait are never delivered."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        use_threads(self._threads)
        launched: _Launched | None = None
        while not self._closed:
            network, rows = self._next(wait=launched is None)
            fresh = None if network is None or not rows else self._launch(network, rows)
            if launched is not None:
                self._collect(launched)  # after the next is on its way: a GPU then has no pause between two
            launched = fresh
            if launched is not None and launched.network.device.type == "cpu":  # done already
                self._collect(launched)
                launched = None

    def _next(self, wait: bool) -> tuple[Network | None, list[Row]]:
        """The next batch; none after a call, at the end, or where there is nothing yet and it shall not wait."""
        with self._change:
            while not self._closed and not self._calls:
                network = self._oldest()
                if network is not None:
                    came = self._lanes[network][0][0]
                    left = came + self._max_wait - time.monotonic()
                    idle = wait and came >= self._free_since
                    if not (idle and left > 0 and self._coming.get(network) and not self._full(network)):
                        return network, self._take(network)
                    self._change.wait(left)
                elif wait:
                    self._change.wait()
                else:
                    return None, []
            if self._closed:
                return None, []
            act, future = self._calls.popleft()
        try:
            act()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return None, []

    def _oldest(self) -> Network | None:
        """The network whose first clip has waited longest; clips that nobody waits for are gone then."""
        for network, lane in list(self._lanes.items()):
            while lane and not lane[0][1].alive:
                lane.popleft()
            if not lane:
                del self._lanes[network]
        return min(self._lanes, key=lambda network: self._lanes[network][0][0], default=None)

    def _full(self, network: Network) -> bool:
        return (len(self._lanes[network]) + 1) * network.tokens > self._max_tokens

    def _take(self, network: Network) -> list[Row]:
        """As many clips as the budget allows, one at least, in the order in which they came."""
        lane, rows = self._lanes[network], list[Row]()
        while lane and (not rows or (len(rows) + 1) * network.tokens <= self._max_tokens):
            row = lane.popleft()[1]
            if row.alive:
                row.taken()
                rows.append(row)
        return rows

    def _launch(self, network: Network, rows: list[Row]) -> _Launched | None:
        asked = [row.outputs for row in rows]
        union = Outputs(
            frozenset().union(*(each.layers for each in asked)),
            any(each.tokens for each in asked),
            any(each.logits for each in asked),
        )
        began = time.monotonic()
        try:
            return _Launched(network, rows, network.forward([row.clip for row in rows], union), began)
        except Exception as error:  # out of memory on the device: these rows fail, others go on
            self._deliver([(row, error) for row in rows])
            return None

    def _collect(self, launched: _Launched) -> None:
        rows = launched.rows
        try:
            seen: list[Any] = list(launched.network.collect(launched.batch))
        except Exception as error:
            seen = [error] * len(rows)
        self._free_since = time.monotonic()
        took = self._free_since - launched.began
        speed = len(rows) * launched.network.tokens / max(took, 1e-9)
        self.tokens_per_s += (speed - self.tokens_per_s) * (SMOOTHING if self.batches else 1.0)
        self.batches, self.rows, self.busy_s = self.batches + 1, self.rows + len(rows), self.busy_s + took
        self._deliver(list(zip(rows, seen, strict=True)))
