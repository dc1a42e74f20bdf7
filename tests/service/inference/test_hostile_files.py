"""Tests that a hostile file fails only its own item, with a clear reason and in bounded time and memory."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.inference.decoders import DecoderPool
from service.inference.engine import Engine, EngineSettings, InferenceOptions, Item, RequestLimits
from service.web.errors import Refusal
from tests.support.data.hostile_decoder import HostileReader
from tests.support.data.hostile_files import FRAMES, HostileFile, corpus
from tests.support.encoders.published_encoders import VIDEO, decoding_processes, film, picture, publish, run

LIMIT_S = 2.0
SLACK_MIB = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[HostileFile]:
    (folder / "videos").mkdir()
    return corpus(folder / "videos")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    # One process, so that CPU time is attributable to one item; a generous timeout, since the machine may be busy.
    limits = RequestLimits(decode_timeout_s=30, frames=FRAMES)
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, limits=limits))
    run(engine.load("main", publish(folder / "encoder", VIDEO)))
    yield engine
    run(engine.close())


async def infer_one(engine: Engine, content: bytes) -> np.ndarray | Refusal:
    try:
        return np.asarray((await engine.infer("main", [Item(content)], InferenceOptions(), 120)).items[0]["embedding"])
    except Refusal as refusal:
        return refusal


def test_hostile_files_are_decoded_or_rejected_in_bounded_time_and_memory(
    engine: Engine, folder: Path, cases: list[HostileFile]
) -> None:
    assert len(cases) >= 60
    ordinary = [picture(0), film(folder / "film.mp4").read_bytes()]

    async def warm_up() -> None:
        for content in ordinary * 10:
            await infer_one(engine, content)

    failures: list[str] = []
    cpu_seconds_by_case: dict[str, float] = {}

    async def infer_all() -> None:
        for case in cases:
            before = cpu_seconds()
            found = await infer_one(engine, case.content)
            cpu_seconds_by_case[case.name] = cpu_seconds() - before
            failures.extend(f"{case.name}: {reason}" for reason in await problems(engine, case, found))

    run(warm_up())
    memory_before = memory_mib()
    run(infer_all())
    assert not failures, "\n".join(failures)
    slow = {name: seconds for name, seconds in cpu_seconds_by_case.items() if seconds > LIMIT_S}
    assert not slow
    run(warm_up())
    assert memory_mib() < memory_before + SLACK_MIB


async def problems(engine: Engine, case: HostileFile, found: np.ndarray | Refusal) -> list[str]:
    if isinstance(found, Refusal):
        if found.code != "item_invalid":
            return [f"refused as {found.code}"]
        reason = found.extra["reason"]
        if case.rejection is None and (case.decodable or case.expected_png is not None):
            return [f"rejected: {reason}"]
        if case.rejection is not None and not re.search(case.rejection, reason):
            return [f"rejected for another reason: {reason}"]
        is_clear = "\n" not in reason and "Traceback" not in reason and "Error:" not in reason and len(reason) < 300
        return [] if is_clear else [f"unclear reason: {reason}"]
    if case.rejection is not None:
        return ["decoded"]
    if not np.isfinite(found).all():
        return ["not finite"]
    if case.expected_png is not None:
        expected = await infer_one(engine, case.expected_png)
        if isinstance(expected, Refusal) or np.abs(found - expected).max() > 1e-5:
            return ["decoded to other content"]
    return []


def cpu_seconds() -> float:
    """Return the total CPU time of all running decoding processes, in seconds."""
    total = 0
    for pid in decoding_processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def memory_mib() -> float:
    """Return the memory of this process and its decoding processes in MiB, counting shared pages once."""
    total = 0
    for pid in (os.getpid(), *decoding_processes()):
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert found is not None
        total += int(found.group(1))
    return total / 1024


class HostileDecoderPool(DecoderPool):
    """A decoder pool whose decoding library hangs, crashes or exhausts memory on request."""

    reader = HostileReader


class HostileEngine(Engine):
    decoder_pool = HostileDecoderPool


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hangs", r"took longer than its limit of 2 s to read and decode"),
        ("segfaults", r"crashed the decoder \(SIGSEGV\); a retry in a fresh process also failed"),
        ("eats", "needs more memory than is allowed for one file"),
    ],
)
def test_a_misbehaving_library_fails_only_its_item(folder: Path, fault: str, reason: str) -> None:
    limits = RequestLimits(decode_timeout_s=2)
    engine = HostileEngine(EngineSettings(device="cpu", threads=1, decoders=1, limits=limits))
    good = film(folder / f"{fault}.mp4").read_bytes()

    async def infer_all() -> list[np.ndarray | Refusal]:
        await engine.load("main", publish(folder / f"encoder-{fault}", VIDEO))
        contents = [good, good + b":" + fault.encode(), good]
        return await asyncio.gather(*(infer_one(engine, content) for content in contents))

    before, bad, after = run(infer_all())
    run(engine.close())
    assert isinstance(bad, Refusal)
    assert re.fullmatch(f"input 0: (?:{reason})", bad.message)
    assert isinstance(before, np.ndarray)
    assert isinstance(after, np.ndarray)
    np.testing.assert_allclose(after, before, atol=1e-6)
