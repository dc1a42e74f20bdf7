"""Fixtures for inference tests: an engine, encoders to load, and files to embed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.inference.engine import Engine, EngineSettings
from tests.support.encoders.published_encoders import IMAGE, VIDEO, film, picture, publish, run
from tests.support.service.engines import NO_TIME_LIMIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with three image encoders, a video encoder, images and videos."""
    folder = tmp_path_factory.mktemp("engine")
    publish(folder / "image", IMAGE, seed=1)
    publish(folder / "other", IMAGE, seed=2)
    publish(folder / "video", VIDEO, seed=3)
    publish(folder / "normed", IMAGE, seed=4, pooling="mean_then_norm", interpolation="bicubic")
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(picture(seed))
        film(folder / f"{seed}.mp4", seed)
    return folder


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(EngineSettings(device="cpu", threads=1, limits=NO_TIME_LIMIT))
    yield engine
    run(engine.close())
