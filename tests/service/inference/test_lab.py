"""Tests for the mask lab's engine: hostile files, the limit on waiting requests, deadlines, and the cache."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amd.presets.load import PRESETS_BY_KIND
from service.inference.lab import CACHED_CLIPS, MAX_WAITING, LabEngine
from service.inference.options import RequestLimits
from service.web.errors import Refusal
from tests.support.data.hostile_files import FRAMES, corpus
from tests.support.encoders.published_encoders import picture, run

CONFIG = PRESETS_BY_KIND["train"]["demo-video-mae"].config.model_dump(mode="json")


@pytest.fixture(scope="module")
def engine() -> Iterator[LabEngine]:
    engine = LabEngine(RequestLimits(decode_timeout_s=30, frames=FRAMES))
    yield engine
    engine.close()


def call(content: bytes | None, deadline_s: float = 120.0) -> dict[str, Any]:
    item = None if content is None else {"content": content}
    return {"config": CONFIG, "step": 0, "position": 0, "deadline_s": deadline_s, "model": None, "item": item}


def view_or_refusal(engine: LabEngine, content: bytes) -> dict[str, Any] | Refusal:
    try:
        return run(engine.view(call(content)))
    except Refusal as refusal:
        return refusal


@pytest.mark.slow
def test_hostile_files_are_drawn_or_rejected_with_a_reason(engine: LabEngine, tmp_path: Path) -> None:
    for case in corpus(tmp_path)[::8]:
        found = view_or_refusal(engine, case.content)
        if not isinstance(found, Refusal):
            assert case.rejection is None, case.name
            assert "input" in found["layers"]
            continue
        assert found.code == "item_invalid", case.name
        assert case.rejection is not None or not case.decodable, f"{case.name}: {found.message}"
        assert re.search(case.rejection or "", found.message), f"{case.name}: {found.message}"


def test_requests_beyond_the_queue_limit_are_rejected(engine: LabEngine) -> None:
    async def view_many() -> list[Any]:
        calls = (engine.view(call(None)) for _ in range(MAX_WAITING + 4))
        return await asyncio.gather(*calls, return_exceptions=True)

    found = run(view_many())
    rejected = [one.code for one in found if isinstance(one, Refusal)]
    assert rejected == ["overloaded"] * 3
    assert "layers" in run(engine.view(call(None)))


def test_a_request_fails_at_its_deadline_and_leaves_the_queue(engine: LabEngine) -> None:
    with pytest.raises(Refusal) as refused:
        run(engine.view(call(picture(), deadline_s=1e-4)))
    assert refused.value.code == "deadline_exceeded"
    assert engine._waiting == 0


def test_only_the_newest_clips_are_cached(engine: LabEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(CACHED_CLIPS + 2):
        run(engine.view(call(picture(seed))))
    assert len(engine._clips) == CACHED_CLIPS
    monkeypatch.setattr(engine, "_decode_file", None)
    run(engine.view(call(picture(CACHED_CLIPS + 1))))
    with pytest.raises(TypeError):
        run(engine.view(call(picture(0))))
