"""What a serving replica runs: encoders in named slots, and requests that are decoded, batched and answered.

    answer(items) → decoders (processes) → clips → the model's thread (batches of one encoder) → the caller's loop

Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amd.config import Precision
from amd.data.decoding.reader import BadSample
from amd.device import choose_device
from service.inference.batching import Batcher, Network
from service.inference.decoders import MIB, Decoders
from service.inference.model import Loaded, Outputs, Plan
from service.inference.options import (
    Answer,
    DeadlineExceeded,
    EngineSettings,
    Item,
    ItemRefused,
    Limits,
    NotLoaded,
    NotPossible,
    QueueFull,
    Refusal,
    Want,
)
from service.inference.reconstruction import Rebuilding

__all__ = [
    "Answer",
    "DeadlineExceeded",
    "Engine",
    "EngineSettings",
    "Item",
    "ItemRefused",
    "Limits",
    "NotLoaded",
    "NotPossible",
    "QueueFull",
    "Refusal",
    "Want",
]

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
SHORTEST_RETRY_S, LONGEST_RETRY_S = 0.1, 60.0


@dataclass
class Share:
    """What one item takes of the backlog."""

    tokens: int
    bytes: int


class Backlog:
    """Tokens that the model has not begun and bytes that are not decoded: what decides whether more is admitted."""

    def __init__(self, max_tokens: int, max_bytes: int) -> None:
        self.max_tokens, self.max_bytes = max_tokens, max_bytes
        self._lock = threading.Lock()
        self.tokens = self.bytes = 0

    def admit(self, shares: Sequence[Share]) -> bool:
        tokens, content = sum(share.tokens for share in shares), sum(share.bytes for share in shares)
        with self._lock:
            # Bytes that come alone are admitted: each file has its own limit.
            if self.tokens + tokens > self.max_tokens or (self.bytes and self.bytes + content > self.max_bytes):
                return False
            self.tokens, self.bytes = self.tokens + tokens, self.bytes + content
            return True

    def give_back(self, share: Share, tokens: int = 0, content: int = 0) -> None:
        """So much of a share, or what is left of it."""
        with self._lock:
            tokens, content = min(tokens, share.tokens), min(content, share.bytes)
            share.tokens, share.bytes = share.tokens - tokens, share.bytes - content
            self.tokens, self.bytes = self.tokens - tokens, self.bytes - content


class Ticket:
    """One request on its way: alive until it is answered, refused, late or given up. Changed in its loop alone."""

    def __init__(self, slot: str, loaded: Loaded, network: Network, plan: Plan, items: int, deadline_s: float) -> None:
        self.slot, self.loaded, self.plan = slot, loaded, plan
        self.network = network
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.answers: list[dict[str, Any]] = [{} for _ in range(items)]
        self._left, self._dropped, self._deadline = items, False, time.monotonic() + deadline_s

    @property
    def alive(self) -> bool:
        return not self._dropped and time.monotonic() < self._deadline

    def drop(self) -> None:
        self._dropped = True

    def finish(self, index: int, answer: dict[str, Any]) -> None:
        self.answers[index] = answer
        self._left -= 1
        if not self._left and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        self.drop()
        if not self.done.done():
            self.done.set_exception(error)


class Pending:
    """One item of a request: waits to be decoded, then for its clips to be seen."""

    def __init__(self, ticket: Ticket, index: int, item: Item, share: Share, arrive: Arrive) -> None:
        self.ticket, self.index, self.item, self.share, self._arrive = ticket, index, item, share, arrive
        self.card, self.views = ticket.loaded.card, ticket.plan.views
        self.seen: dict[int, Any] = {}  # by the number of the view

    @property
    def alive(self) -> bool:
        return self.ticket.alive

    def decoded(self, clips: Tensor | Exception | None) -> None:
        self._arrive(self, clips)


Arrive = Callable[[Pending, "Tensor | Exception | None"], None]


class View:
    """One clip of an item, in the model's queue."""

    def __init__(self, pending: Pending, number: int, clip: Tensor, backlog: Backlog) -> None:
        self.pending, self.number, self.clip, self._backlog = pending, number, clip, backlog
        self.outputs: Outputs = pending.ticket.plan.outputs

    @property
    def alive(self) -> bool:
        return self.pending.alive

    def taken(self) -> None:
        self._backlog.give_back(self.pending.share, tokens=self.pending.ticket.loaded.tokens)


class Engine:
    decoders: type[Decoders] = Decoders

    def __init__(self, settings: EngineSettings) -> None:
        """Raises ConfigError where there is no such device."""
        self.settings = settings
        self._device = choose_device(settings.device)
        self._precision: Precision = "bf16" if settings.dtype == "bfloat16" else "fp32"
        self._backlog = Backlog(settings.max_queued_tokens, settings.max_queued_mib * MIB)
        budget = settings.max_batch_tokens or BATCH_TOKENS[self._device.type]
        threads = settings.threads or torch.get_num_threads()  # as it was before other threads took one each
        self._batcher = Batcher(self._deliver, budget, settings.max_wait_ms / 1000, threads)
        self._decoders = self.decoders(settings.decoders, settings.limits)
        self._slots: dict[str, Loaded] = {}
        self._tickets: set[Ticket] = set()
        self._loading = asyncio.Lock()
        self._count: Counter[str] = Counter()

    async def load(self, slot: str, url: str) -> None:
        """Load the encoder published at `url`, warm it up, then put it in the slot at once.

        Requests that were admitted before finish on the encoder that was there. Raises ConfigError where nothing sound
        is published at `url`; the slot is then as it was.
        """
        async with self._loading:
            await asyncio.gather(*map(asyncio.wrap_future, self._decoders.ready))
            loaded = await asyncio.to_thread(Loaded, url, self._device, self._precision)
            await asyncio.wrap_future(self._batcher.call(loaded.warm_up))
            self._slots[slot] = loaded

    async def unload(self, slot: str) -> None:
        """Empty the slot; requests that were admitted before are answered."""
        self._slots.pop(slot, None)

    async def answer(self, slot: str, items: Sequence[Item], want: Want, deadline_s: float) -> Answer:
        """All items by the encoder that is in the slot now.

        Raises NotLoaded, NotPossible, QueueFull, ItemRefused (the first bad item found; the others are dropped),
        DeadlineExceeded. A caller that is cancelled takes its items out of the queue.
        """
        loaded = self._slots.get(slot)
        if loaded is None:
            raise NotLoaded(slot)
        plan = loaded.plan(want, self.settings.limits)
        network: Network = Rebuilding(loaded, want) if want.task == "reconstruction" else loaded
        shares = self._shares(loaded, plan, items)
        if not items:
            return Answer(loaded.id, [])
        if not self._backlog.admit(shares):
            self._count["full"] += 1
            raise QueueFull(self._retry_after_s())
        ticket = Ticket(slot, loaded, network, plan, len(items), deadline_s)
        pending = [
            Pending(ticket, index, item, share, self._arrived)
            for index, (item, share) in enumerate(zip(items, shares, strict=True))
        ]
        self._tickets.add(ticket)
        self._count.update(requests=1, items=len(items))
        try:
            self._batcher.expect(network, len(items))
            for item in pending:
                self._decoders.put(item)
            async with asyncio.timeout(deadline_s):
                await ticket.done
        except TimeoutError:
            self._count["late"] += 1
            raise DeadlineExceeded(deadline_s) from None
        except asyncio.CancelledError:
            self._count["cancelled"] += 1
            raise
        finally:
            ticket.drop()
            self._tickets.discard(ticket)
            for share in shares:
                self._backlog.give_back(share, share.tokens, share.bytes)
        self._count["answered"] += 1
        return Answer(loaded.id, ticket.answers)

    def state(self) -> dict[str, Any]:
        """Encoders by slot, what is queued and in flight, and counts since the start."""
        batcher = self._batcher
        return {
            "slots": {
                slot: {"encoder": loaded.id, "url": loaded.url, "tokens_per_clip": loaded.tokens}
                for slot, loaded in self._slots.items()
            },
            "device": str(self._device),
            "queued_tokens": self._backlog.tokens,
            "queued_bytes": self._backlog.bytes,
            "in_flight": len(self._tickets),
            "tokens_per_s": batcher.tokens_per_s,
            "counters": {
                **{name: self._count[name] for name in ("requests", "items", "answered", "full", "late", "cancelled")},
                "refused_items": self._decoders.refused,
                "batches": batcher.batches,
                "clips": batcher.rows,
                "busy_s": batcher.busy_s,
            },
        }

    async def close(self) -> None:
        """End threads and processes; requests in flight are told that nothing is loaded any more."""
        self._slots.clear()
        for ticket in list(self._tickets):
            ticket.fail(NotLoaded(ticket.slot))
        await asyncio.to_thread(self._decoders.close)
        await asyncio.to_thread(self._batcher.close)

    def _shares(self, loaded: Loaded, plan: Plan, items: Sequence[Item]) -> list[Share]:
        """Raises NotPossible for more than any request may ask, ItemRefused for a file that is too large."""
        limits, tokens = self.settings.limits, loaded.tokens * plan.clips
        most = limits.rebuilt_items if plan.want.task == "reconstruction" else limits.items
        if len(items) > most:
            raise NotPossible(f"{len(items)} items are more than the {most} that a request may have")
        if tokens * len(items) > self._backlog.max_tokens:
            raise NotPossible(
                f"{len(items)} items of {tokens} tokens are more than the queue holds ({self._backlog.max_tokens}); "
                "ask for fewer at once, or for fewer views"
            )
        shares = []
        for index, item in enumerate(items):
            size = len(item.content or b"")
            if item.content is None and item.uri is None:
                raise ItemRefused(index, "has neither content nor a URI")
            if size > limits.bytes_mib * MIB:
                raise ItemRefused(index, f"has {size} bytes, more than {limits.bytes_mib * MIB}")
            shares.append(Share(tokens, size))
        return shares

    def _retry_after_s(self) -> float:
        speed = self._batcher.tokens_per_s
        needed = self._backlog.tokens / speed if speed else 1.0
        return min(max(needed, SHORTEST_RETRY_S), LONGEST_RETRY_S)

    def _arrived(self, item: Pending, clips: Tensor | Exception | None) -> None:
        """In a decoder's thread."""
        ticket, item.item = item.ticket, Item()  # its bytes are not needed again
        self._backlog.give_back(item.share, content=item.share.bytes)
        rows = list[View]()
        if isinstance(clips, Tensor):
            rows = [View(item, number, clip, self._backlog) for number, clip in enumerate(clips)]
        elif isinstance(clips, BadSample):
            _in_loop(ticket.loop, ticket.fail, ItemRefused(item.index, clips.reason))
        elif clips is not None:
            _in_loop(ticket.loop, ticket.fail, clips)
        self._batcher.put(ticket.network, rows)

    def _deliver(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """In the model's thread: what is left to do for an item happens in its caller's loop."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[View, Any]]] = {}
        for view, seen in pairs:
            loops.setdefault(view.pending.ticket.loop, []).append((view, seen))
        for loop, some in loops.items():
            _in_loop(loop, _finish, some)


def _finish(pairs: Sequence[tuple[View, Any]]) -> None:
    for view, seen in pairs:
        item, ticket = view.pending, view.pending.ticket
        if isinstance(seen, Exception):
            ticket.fail(seen)
            continue
        item.seen[view.number] = seen
        if len(item.seen) == ticket.plan.clips and not ticket.done.done():
            try:
                ordered = [item.seen[number] for number in range(ticket.plan.clips)]
                ticket.finish(item.index, ticket.network.finish(ticket.plan, ordered))
            except Exception as error:
                ticket.fail(error)


def _in_loop(loop: asyncio.AbstractEventLoop, act: Callable[..., object], *words: object) -> None:
    with suppress(RuntimeError):  # the caller's loop is closed, and nobody waits
        loop.call_soon_threadsafe(act, *words)
