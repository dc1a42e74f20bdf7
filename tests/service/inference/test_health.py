"""Tests that a replica becomes unhealthy once no further batch can succeed in its process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.inference.batching import Batcher
from service.inference.engine import Engine
from service.inference.model import RequestedOutputs
from service.inference.replica import Replica
from service.web.errors import Refusal


class FailingNetwork:
    """A model whose forward pass raises an error, on a fake device."""

    tokens, device = 1, torch.device("cpu")

    def __init__(self, error: Exception) -> None:
        self._error = error

    def forward(self, clips: Sequence[Any], outputs: RequestedOutputs) -> Any:
        raise self._error


def clip() -> Any:
    outputs = RequestedOutputs(frozenset(), False, False)
    return SimpleNamespace(clip=torch.zeros(1), outputs=outputs, is_active=True, on_dequeue=lambda fill: None)


def engine_with(batcher: Batcher) -> Any:
    """Return an engine with a batcher and a loaded encoder, but without decoding processes."""
    engine = Engine.__new__(Engine)
    engine._batcher, engine._slots = batcher, {"main": SimpleNamespace()}
    return engine


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (RuntimeError("CUDA error: illegal access\nmore"), "the device failed: CUDA error: illegal access"),
        (torch.OutOfMemoryError("CUDA error: out of memory"), ""),
        (ValueError("of one batch"), ""),
    ],
)
def test_an_unrecoverable_device_error_makes_the_replica_unhealthy(error: Exception, problem: str) -> None:
    results, arrived = list[Any](), threading.Event()

    def deliver(pairs: Sequence[Any]) -> None:
        results.extend(pairs)
        arrived.set()

    batcher, network = Batcher(deliver, 8, 0.0, 1), FailingNetwork(error)
    batcher.expect(network, 1)  # type: ignore[arg-type]
    batcher.put(network, [clip()])  # type: ignore[arg-type]
    assert arrived.wait(60)
    assert [found for _, found in results] == [error]
    engine = engine_with(batcher)
    assert engine.problem == problem
    replica = Replica.func_or_class.__new__(Replica.func_or_class)
    replica._engine = engine
    if problem:
        with pytest.raises(RuntimeError, match="the device failed"):
            asyncio.run(replica.check_health())
        with pytest.raises(Refusal, match="the device failed") as refused:
            asyncio.run(engine.infer("main", [], None, 1.0))
        assert refused.value.code == "encoder_unavailable"
    else:
        asyncio.run(replica.check_health())
    batcher.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_replica_whose_model_thread_has_died_is_unhealthy() -> None:
    batcher = Batcher(lambda pairs: None, 8, 0.0, 1)
    assert batcher.problem == ""

    def end() -> None:
        raise SystemExit("killed")

    batcher.call(end)
    batcher._thread.join(60)
    assert engine_with(batcher).problem == "the model thread has ended: SystemExit: killed"
