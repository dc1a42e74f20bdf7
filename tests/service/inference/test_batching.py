"""Tests for queue limits, cancellation and batching in the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from service.inference.engine import Engine, EngineSettings
from service.web.errors import Refusal
from tests.support.encoders.published_encoders import IMAGE, run
from tests.support.service.engines import DEADLINE_S, EMBEDDING, NO_TIME_LIMIT, infer, load_slots, upload


class PausedModel:
    """Pauses the model thread, as a long batch would, so that clips stay in the queue."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._resume = engine, threading.Event()

    def __enter__(self) -> PausedModel:
        self._pause = self._engine._batcher.call(lambda: self._resume.wait() and None)
        return self

    def __exit__(self, *_: object) -> None:
        self._resume.set()
        self._pause.result()


async def wait_for_queued_clips(engine: Engine, clips: int) -> None:
    """Wait until the model's queue contains this many clips."""
    while sum(map(len, engine._batcher._queues.values())) < clips:
        await asyncio.sleep(0.005)


def test_a_full_queue_rejects_requests_with_a_retry_delay(folder: Path) -> None:
    tokens = IMAGE.grid.tokens
    engine = Engine(
        EngineSettings(device="cpu", threads=1, decoders=1, max_queued_tokens=3 * tokens, limits=NO_TIME_LIMIT)
    )
    load_slots(engine, main=folder / "image")
    item = upload(folder / "0.png")

    async def fill_queue() -> None:
        with PausedModel(engine):
            waiting = [asyncio.create_task(engine.infer("main", [item], EMBEDDING, DEADLINE_S)) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(Refusal) as full:
                await engine.infer("main", [item], EMBEDDING, DEADLINE_S)
            assert full.value.code == "overloaded"
            assert 0 < full.value.extra["retry_after"] <= 60
            with pytest.raises(Refusal, match="exceed the queue's capacity") as too_large:
                await engine.infer("main", [item] * 4, EMBEDDING, DEADLINE_S)
            assert too_large.value.code == "not_possible"
            assert engine.state()["queued_tokens"] == 3 * tokens
            waiting[0].cancel()
            await asyncio.sleep(0.01)
            # The cancelled request has freed its share of the queue.
            waiting.append(asyncio.create_task(engine.infer("main", [item], EMBEDDING, DEADLINE_S)))
            await asyncio.sleep(0)
        results = await asyncio.gather(*waiting[1:])
        assert len(results) == 3

    run(fill_queue())
    assert engine.state()["counters"]["full"] == 1
    run(engine.close())


def test_cancelled_and_expired_requests_never_reach_the_model(engine: Engine, folder: Path) -> None:
    load_slots(engine, main=folder / "image")
    item = upload(folder / "0.png")

    async def cancel_and_expire() -> None:
        before = engine.state()["counters"]["clips"]
        with PausedModel(engine):
            cancelled = asyncio.create_task(engine.infer("main", [item, item], EMBEDDING, DEADLINE_S))
            kept = asyncio.create_task(engine.infer("main", [item], EMBEDDING, DEADLINE_S))
            late = asyncio.create_task(engine.infer("main", [item], EMBEDDING, 0.2))
            await wait_for_queued_clips(engine, 3)
            cancelled.cancel()
            with pytest.raises(Refusal, match=r"its deadline of 0\.2 s") as expired:
                await late
            assert expired.value.code == "deadline_exceeded"
            assert engine.state()["queued_tokens"] == IMAGE.grid.tokens
        assert len((await kept).items) == 1
        assert engine.state()["counters"]["clips"] == before + 1
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    run(cancel_and_expire())


def test_queued_clips_are_batched_within_the_token_budget(folder: Path) -> None:
    budget = 4 * IMAGE.grid.tokens
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, max_batch_tokens=budget, limits=NO_TIME_LIMIT))
    load_slots(engine, main=folder / "image", candidate=folder / "other")
    item = upload(folder / "0.png")

    async def count_batches() -> int:
        nonlocal fills
        before = engine.state()["counters"]["batches"]
        with PausedModel(engine):
            slots = ["main"] * 5 + ["candidate"] * 3 + ["main"] * 2
            requests = [asyncio.create_task(engine.infer(slot, [item], EMBEDDING, DEADLINE_S)) for slot in slots]
            await wait_for_queued_clips(engine, len(slots))
        results = await asyncio.gather(*requests)
        fills = [result.batch_fill for result in results]
        assert all(result.queue_s > 0 for result in results)
        return int(engine.state()["counters"]["batches"] - before)

    fills = list[float]()
    assert run(count_batches()) == 3  # 4 of main, 3 of candidate, 3 of main: batches never mix encoders
    assert sorted(fills) == pytest.approx([0.75] * 6 + [1.0] * 4)
    run(engine.close())


def test_an_idle_model_waits_only_for_clips_that_are_being_decoded(folder: Path) -> None:
    settings = EngineSettings(device="cpu", threads=1, decoders=1, max_wait_ms=60_000, limits=NO_TIME_LIMIT)
    engine = Engine(settings)
    load_slots(engine, main=folder / "image")
    item = upload(folder / "0.png")

    async def infer_all() -> None:
        before = engine.state()["counters"]["batches"]
        await engine.infer("main", [item], EMBEDDING, DEADLINE_S)  # a single item: nothing to wait for
        await engine.infer("main", [item] * 5, EMBEDDING, DEADLINE_S)
        assert engine.state()["counters"]["batches"] == before + 2

    began = time.monotonic()
    run(infer_all())
    assert time.monotonic() - began < 60  # max_wait_ms did not elapse
    run(engine.close())


def test_decoding_does_not_change_the_thread_count_of_the_model(folder: Path) -> None:
    engine = Engine(EngineSettings(device="cpu", threads=3, decoders=2, limits=NO_TIME_LIMIT))
    load_slots(engine, main=folder / "image")
    infer(engine, *[upload(folder / "0.png")] * 4)
    found: list[int] = []
    engine._batcher.call(lambda: found.append(torch.get_num_threads())).result()
    assert found == [3]  # although decoder threads set theirs to 1
    run(engine.close())
