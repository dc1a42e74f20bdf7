"""Inference engine of a serving replica: admit, decode, batch and run requests with the encoders in named slots.

    infer(items) → decoder processes → clips → model thread (batches for one encoder) → the caller's event loop

Does not import FastAPI or Ray.
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
from amd.storage import StorageUnreachable
from service.inference.batching import Batcher, Network
from service.inference.decoders import MIB, DecoderPool
from service.inference.model import InferencePlan, LoadedEncoder, RequestedOutputs
from service.inference.options import EngineSettings, InferenceOptions, InferenceResult, Item, RequestLimits
from service.inference.reconstruction import ReconstructionNetwork
from service.serving.protocol import ARROW
from service.web.errors import Refusal, invalid_item

__all__ = ["Engine", "EngineSettings", "InferenceOptions", "InferenceResult", "Item", "RequestLimits"]

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
SHORTEST_RETRY_S, LONGEST_RETRY_S = 0.1, 60.0


@dataclass
class BacklogShare:
    """Part of the backlog that one item occupies."""

    tokens: int
    bytes: int
    output: int


class Backlog:
    """Admission limits on tokens waiting for a forward pass, bytes waiting to be decoded, and bytes of outputs."""

    def __init__(self, max_tokens: int, max_bytes: int, max_output: int) -> None:
        self.max_tokens, self.max_bytes, self.max_output = max_tokens, max_bytes, max_output
        self._lock = threading.Lock()
        self.tokens = self.bytes = self.output = 0

    def admit(self, shares: Sequence[BacklogShare]) -> bool:
        """Add a request's shares if they fit. Returns whether they did."""
        tokens, content = sum(share.tokens for share in shares), sum(share.bytes for share in shares)
        output = sum(share.output for share in shares)
        with self._lock:
            # With nothing queued, any request is admitted, because per-request limits already bound its size.
            if (
                self.tokens + tokens > self.max_tokens
                or (self.bytes and self.bytes + content > self.max_bytes)
                or (self.output and self.output + output > self.max_output)
            ):
                return False
            self.tokens, self.bytes, self.output = self.tokens + tokens, self.bytes + content, self.output + output
            return True

    def release(self, share: BacklogShare, tokens: int = 0, content: int = 0) -> None:
        """Remove tokens and bytes from the backlog, but no more than the share still holds."""
        with self._lock:
            tokens, content = min(tokens, share.tokens), min(content, share.bytes)
            share.tokens, share.bytes = share.tokens - tokens, share.bytes - content
            self.tokens, self.bytes = self.tokens - tokens, self.bytes - content

    def release_all(self, share: BacklogShare) -> None:
        """Remove everything that the share still holds, including outputs."""
        self.release(share, share.tokens, share.bytes)
        with self._lock:
            self.output, share.output = self.output - share.output, 0


class PendingRequest:
    """A request in flight, active until it completes, fails, expires or is cancelled.

    Mutated only on its event loop.
    """

    def __init__(
        self, slot: str, loaded: LoadedEncoder, network: Network, plan: InferencePlan, items: int, deadline_s: float
    ) -> None:
        self.slot, self.loaded, self.plan = slot, loaded, plan
        self.network = network
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.results: list[dict[str, Any]] = [{} for _ in range(items)]
        self.queue_s, self.batch_fill = 0.0, 0.0
        self._left, self._dropped, self._deadline = items, False, time.monotonic() + deadline_s

    @property
    def is_active(self) -> bool:
        return not self._dropped and time.monotonic() < self._deadline

    def drop(self) -> None:
        self._dropped = True

    def note_batch(self, queue_s: float, batch_fill: float) -> None:
        """Record how long a clip waited, and its batch's fraction of the token budget."""
        self.queue_s = max(self.queue_s, queue_s)
        self.batch_fill += batch_fill / (len(self.results) * self.plan.clips)

    def complete_item(self, index: int, result: dict[str, Any]) -> None:
        self.results[index] = result
        self._left -= 1
        if not self._left and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        self.drop()
        if not self.done.done():
            self.done.set_exception(error)


class PendingItem:
    """One item of a request, which is first decoded and then waits for the outputs of its clips."""

    def __init__(
        self, request: PendingRequest, index: int, item: Item, share: BacklogShare, on_decoded: OnDecoded
    ) -> None:
        self.request, self.index, self.item, self.share, self._on_decoded = request, index, item, share, on_decoded
        self.card, self.views = request.loaded.card, request.plan.views
        self.outputs: dict[int, Any] = {}  # by clip number

    @property
    def is_active(self) -> bool:
        return self.request.is_active

    def on_decoded(self, clips: Tensor | Exception | None) -> None:
        self._on_decoded(self, clips)


OnDecoded = Callable[[PendingItem, "Tensor | Exception | None"], None]


class PendingClip:
    """One clip of an item in the model's queue."""

    def __init__(self, pending: PendingItem, number: int, clip: Tensor, backlog: Backlog) -> None:
        self.pending, self.number, self.clip, self._backlog = pending, number, clip, backlog
        self.outputs: RequestedOutputs = pending.request.plan.outputs
        self.queue_s, self.batch_fill, self._queued_at = 0.0, 0.0, time.monotonic()

    @property
    def is_active(self) -> bool:
        return self.pending.is_active

    def on_dequeue(self, batch_fill: float) -> None:
        self.queue_s, self.batch_fill = time.monotonic() - self._queued_at, batch_fill
        self._backlog.release(self.pending.share, tokens=self.pending.request.loaded.tokens)


class Engine:
    """Serves requests with the encoders in its slots."""

    decoder_pool: type[DecoderPool] = DecoderPool

    def __init__(self, settings: EngineSettings) -> None:
        """Start the decoders and the model thread. Raises ConfigError if the device is not available."""
        self.settings = settings
        self._device = choose_device(settings.device)
        self._precision: Precision = "bf16" if settings.dtype == "bfloat16" else "fp32"
        self._backlog = Backlog(
            settings.max_queued_tokens, settings.max_queued_mib * MIB, settings.max_output_mib * MIB
        )
        budget = settings.max_batch_tokens or BATCH_TOKENS[self._device.type]
        threads = settings.threads or torch.get_num_threads()  # read before decoder threads set theirs to 1
        self._batcher = Batcher(self._deliver, budget, settings.max_wait_ms / 1000, threads)
        self._decoders = self.decoder_pool(settings.decoders, settings.limits)
        self._slots: dict[str, LoadedEncoder] = {}
        self._requests: set[PendingRequest] = set()
        self._loading = asyncio.Lock()
        self._count: Counter[str] = Counter()

    async def load(self, slot: str, url: str) -> None:
        """Load the encoder published at `url`, warm it up, then swap it into the slot.

        Requests admitted earlier finish on the previous encoder. Raises ConfigError, leaving the slot
        unchanged, if `url` does not contain a valid encoder.
        """
        async with self._loading:
            await asyncio.gather(*map(asyncio.wrap_future, self._decoders.ready))
            loaded = await asyncio.to_thread(LoadedEncoder, url, self._device, self._precision)
            await asyncio.wrap_future(self._batcher.call(loaded.warm_up))
            self._slots[slot] = loaded

    async def unload(self, slot: str) -> None:
        """Empty the slot; requests admitted earlier still complete."""
        self._slots.pop(slot, None)

    async def infer(
        self, slot: str, items: Sequence[Item], options: InferenceOptions, deadline_s: float, as_json: bool = False
    ) -> InferenceResult:
        """Run all items through the encoder currently in the slot.

        `as_json`: whether the results will be sent as JSON, for which the limit on tokens and layers is lower.
        Raises Refusal; the first bad item fails the whole request. Cancelling the caller removes its items from the
        queue.
        """
        loaded = self._slots.get(slot)
        if loaded is None:
            raise _not_loaded(slot)
        if self.problem:
            raise Refusal("encoder_unavailable", self.problem)
        plan = loaded.plan(options, self.settings.limits)
        network: Network = ReconstructionNetwork(loaded, options) if options.task == "reconstruction" else loaded
        shares = self._shares(
            loaded, plan, items, output_bytes(loaded, plan, len(items), self.settings.limits, as_json)
        )
        if not items:
            return InferenceResult(loaded.id, [])
        if not self._backlog.admit(shares):
            self._count["full"] += 1
            retry_after = self._retry_after_s()
            raise Refusal("overloaded", f"the queue is full; retry in {retry_after:.1f} s", retry_after=retry_after)
        request = PendingRequest(slot, loaded, network, plan, len(items), deadline_s)
        pending = [
            PendingItem(request, index, item, share, self._handle_decoded)
            for index, (item, share) in enumerate(zip(items, shares, strict=True))
        ]
        self._requests.add(request)
        self._count.update(requests=1, items=len(items))
        try:
            self._batcher.expect(network, len(items))
            for item in pending:
                self._decoders.put(item)
            async with asyncio.timeout(deadline_s):
                await request.done
        except TimeoutError:
            self._count["late"] += 1
            message = f"the request did not finish within its deadline of {deadline_s:g} s"
            raise Refusal("deadline_exceeded", message) from None
        except asyncio.CancelledError:
            self._count["cancelled"] += 1
            raise
        finally:
            request.drop()
            self._requests.discard(request)
            for share in shares:
                self._backlog.release_all(share)
        self._count["answered"] += 1
        return InferenceResult(loaded.id, request.results, request.queue_s, request.batch_fill)

    @property
    def problem(self) -> str:
        """Reason why this process can no longer serve and must be replaced; empty while it can serve."""
        return self._batcher.problem

    def state(self) -> dict[str, Any]:
        """Return the encoders by slot, the queue length, the requests in flight, and counters since startup."""
        batcher = self._batcher
        return {
            "slots": {
                slot: {"encoder": loaded.id, "url": loaded.url, "tokens_per_clip": loaded.tokens}
                for slot, loaded in self._slots.items()
            },
            "device": str(self._device),
            "queued_tokens": self._backlog.tokens,
            "queued_bytes": self._backlog.bytes,
            "in_flight": len(self._requests),
            "tokens_per_s": batcher.tokens_per_s,
            "counters": {
                **{name: self._count[name] for name in ("requests", "items", "answered", "full", "late", "cancelled")},
                "refused_items": self._decoders.rejected_items,
                "batches": batcher.batches,
                "clips": batcher.clips,
                "busy_s": batcher.busy_s,
            },
        }

    async def close(self) -> None:
        """Stop threads and processes; requests in flight fail."""
        self._slots.clear()
        for request in list(self._requests):
            request.fail(_not_loaded(request.slot))
        await asyncio.to_thread(self._decoders.close)
        await asyncio.to_thread(self._batcher.close)

    def _shares(
        self, loaded: LoadedEncoder, plan: InferencePlan, items: Sequence[Item], output: int
    ) -> list[BacklogShare]:
        """Compute the backlog share of each item. `output`: bytes of tokens and layers that an item returns.

        Raises Refusal if the request or a file exceeds a limit.
        """
        limits, tokens = self.settings.limits, loaded.tokens * plan.clips
        max_items = limits.rebuilt_items if plan.options.task == "reconstruction" else limits.items
        if len(items) > max_items:
            raise Refusal(
                "not_possible", f"{len(items)} items exceed the limit of {max_items} per request; split the request"
            )
        if tokens * len(items) > self._backlog.max_tokens:
            raise Refusal(
                "not_possible",
                f"{len(items)} items of {tokens} tokens exceed the queue's capacity of "
                f"{self._backlog.max_tokens} tokens; send fewer items or request fewer views",
            )
        shares = []
        for index, item in enumerate(items):
            size = len(item.content or b"")
            if item.content is None and item.uri is None:
                raise invalid_item(index, "has neither content nor a URI")
            if size > limits.bytes_mib * MIB:
                raise invalid_item(index, f"has {size} bytes, more than the limit of {limits.bytes_mib * MIB}")
            shares.append(BacklogShare(tokens, size, output))
        return shares

    def _retry_after_s(self) -> float:
        speed = self._batcher.tokens_per_s
        needed = self._backlog.tokens / speed if speed else 1.0
        return min(max(needed, SHORTEST_RETRY_S), LONGEST_RETRY_S)

    def _handle_decoded(self, item: PendingItem, clips: Tensor | Exception | None) -> None:
        """Queue an item's clips or fail its request. Called on a decoder thread."""
        request, item.item = item.request, Item()  # release its bytes
        self._backlog.release(item.share, content=item.share.bytes)
        queued = list[PendingClip]()
        if isinstance(clips, Tensor):
            queued = [PendingClip(item, number, clip, self._backlog) for number, clip in enumerate(clips)]
        elif isinstance(clips, BadSample):
            _in_loop(request.loop, request.fail, invalid_item(item.index, clips.reason))
        elif isinstance(clips, StorageUnreachable):
            message = f"input {item.index}: {clips}"
            refusal = Refusal("input_unavailable", message, item.index, reason=str(clips))
            _in_loop(request.loop, request.fail, refusal)
        elif clips is not None:
            _in_loop(request.loop, request.fail, clips)
        self._batcher.put(request.network, queued)

    def _deliver(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Hand results to the event loops of their callers. Called on the model thread."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[PendingClip, Any]]] = {}
        for clip, outputs in pairs:
            loops.setdefault(clip.pending.request.loop, []).append((clip, outputs))
        for loop, pairs_of_loop in loops.items():
            _in_loop(loop, _complete, pairs_of_loop)


def output_bytes(loaded: LoadedEncoder, plan: InferencePlan, items: int, limits: RequestLimits, as_json: bool) -> int:
    """Return the size in bytes of the tokens and layers returned for each item.

    Raises Refusal if the total over all items exceeds the limit.
    """
    outputs = len(plan.outputs.layers) + plan.outputs.tokens
    size = outputs * loaded.tokens * loaded.width * 4  # float32
    limit_mib = limits.json_output_mib if as_json else limits.output_mib
    if items * size > limit_mib * MIB:
        fits = limit_mib * MIB // size
        fewer = f"request at most {fits} items at once" if fits else "request fewer layers"
        remedy = f"send Accept: {ARROW}, or {fewer}" if as_json else fewer
        raise Refusal(
            "not_possible",
            f"{items} items x {outputs} outputs (tokens and layers) x {loaded.tokens} tokens x {loaded.width} values x "
            f"4 bytes are {items * size / MIB:.1f} MiB, more than the limit of {limit_mib} MiB"
            f"{' for JSON' if as_json else ''}; {remedy}",
        )
    return size


def _not_loaded(slot: str) -> Refusal:
    return Refusal("encoder_unavailable", f"no encoder is loaded as {slot!r}")


def _complete(pairs: Sequence[tuple[PendingClip, Any]]) -> None:
    for clip, outputs in pairs:
        item, request = clip.pending, clip.pending.request
        if isinstance(outputs, Exception):
            request.fail(outputs)
            continue
        item.outputs[clip.number] = outputs
        request.note_batch(clip.queue_s, clip.batch_fill)
        if len(item.outputs) == request.plan.clips and not request.done.done():
            try:
                ordered = [item.outputs[number] for number in range(request.plan.clips)]
                request.complete_item(item.index, request.network.item_result(request.plan, ordered))
            except Exception as error:
                request.fail(error)


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    with suppress(RuntimeError):  # the caller's loop is closed, so no one is waiting
        loop.call_soon_threadsafe(function, *args)
