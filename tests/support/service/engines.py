"""Helpers that load encoders into an inference engine and run requests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from amd.downstream.embedding.features import embed_file
from service.inference.engine import Engine, InferenceOptions, InferenceResult, Item, RequestLimits
from tests.support.encoders.published_encoders import run

NO_TIME_LIMIT = RequestLimits(decode_timeout_s=30)  # decoding time is not tested, and the machine may be busy
DEADLINE_S = 120.0
EMBEDDING = InferenceOptions()


def load_slots(engine: Engine, **urls: Path) -> Engine:
    """Load an encoder into each slot."""

    async def load() -> None:
        for slot, url in urls.items():
            await engine.load(slot, str(url))

    run(load())
    return engine


def infer(engine: Engine, *items: Item, slot: str = "main", **options: object) -> InferenceResult:
    """Run one request and return its result."""
    return run(engine.infer(slot, items, InferenceOptions.model_validate(options), DEADLINE_S))


@cache
def embed_offline(encoder: Path, file: Path) -> np.ndarray:
    """Embed a file without the inference engine."""
    return embed_file(str(encoder), str(file))


def upload(path: Path) -> Item:
    """Create an item that contains a file's bytes."""
    return Item(path.read_bytes())


def reference(path: Path) -> Item:
    """Create an item that refers to a file by path."""
    return Item(uri=str(path))
