from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.inference.decoders import Decoders
from service.inference.engine import Engine, EngineSettings, Item, ItemRefused, Limits, Want
from tests.support.data.hostile_decoder import HostileReader
from tests.support.data.hostile_files import FRAMES, Case, corpus
from tests.support.service.published_encoders import VIDEO, decoding_processes, film, picture, publish, run

LIMIT_S = 2.0
SLACK_MIB = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[Case]:
    (folder / "videos").mkdir()
    return corpus(folder / "videos")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    # One process, so that its CPU time is an item's; a busy machine gets more seconds than a free one needs.
    limits = Limits(decode_timeout_s=30, frames=FRAMES)
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, limits=limits))
    run(engine.load("main", publish(folder / "encoder", VIDEO)))
    yield engine
    run(engine.close())


async def outcome(engine: Engine, content: bytes) -> np.ndarray | ItemRefused:
    try:
        return np.asarray((await engine.answer("main", [Item(content)], Want(), 120)).items[0]["embedding"])
    except ItemRefused as error:
        return error


def test_at_least_sixty_files_are_answered_rightly_or_refused_in_bounded_time_and_memory(
    engine: Engine, folder: Path, cases: list[Case]
) -> None:
    assert len(cases) >= 60
    ordinary = [picture(0), film(folder / "film.mp4").read_bytes()]

    async def settle() -> None:
        for content in ordinary * 10:
            await outcome(engine, content)

    wrong: list[str] = []
    spent: dict[str, float] = {}

    async def try_all() -> None:
        for case in cases:
            before = cpu_seconds()
            found = await outcome(engine, case.content)
            spent[case.name] = cpu_seconds() - before
            wrong.extend(f"{case.name}: {reason}" for reason in await problems(engine, case, found))

    run(settle())
    level = memory_mib()
    run(try_all())
    assert not wrong, "\n".join(wrong)
    slow = {name: seconds for name, seconds in spent.items() if seconds > LIMIT_S}
    assert not slow
    run(settle())
    assert memory_mib() < level + SLACK_MIB


async def problems(engine: Engine, case: Case, found: np.ndarray | ItemRefused) -> list[str]:
    if isinstance(found, ItemRefused):
        reason = found.reason
        if case.refused is None and (case.answered or case.shows is not None):
            return [f"refused: {reason}"]
        if case.refused is not None and not re.search(case.refused, reason):
            return [f"refused for another reason: {reason}"]
        clear = "\n" not in reason and "Traceback" not in reason and "Error:" not in reason and len(reason) < 300
        return [] if clear else [f"not a clear reason: {reason}"]
    if case.refused is not None:
        return ["answered"]
    if not np.isfinite(found).all():
        return ["not finite"]
    if case.shows is not None:
        expected = await outcome(engine, case.shows)
        if isinstance(expected, ItemRefused) or np.abs(found - expected).max() > 1e-5:
            return ["shows something else"]
    return []


def cpu_seconds() -> float:
    """Of all decoding processes that run, by ticks."""
    total = 0
    for pid in decoding_processes():
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(words[11]) + int(words[12])
    return total / os.sysconf("SC_CLK_TCK")


def memory_mib() -> float:
    """Of this process and its decoding processes, shared pages counted once."""
    total = 0
    for pid in (os.getpid(), *decoding_processes()):
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert found is not None
        total += int(found.group(1))
    return total / 1024


class HostileDecoders(Decoders):
    reader = HostileReader


class HostileEngine(Engine):
    decoders = HostileDecoders


@pytest.mark.parametrize(
    ("manner", "reason"),
    [
        ("hangs", r"took longer than its limit of 2 s to read and decode"),
        ("segfaults", r"crashed the decoder \(SIGSEGV\)"),
        ("eats", "needs more memory than one file allows"),
    ],
)
def test_a_library_that_misbehaves_costs_one_item(folder: Path, manner: str, reason: str) -> None:
    engine = HostileEngine(EngineSettings(device="cpu", threads=1, decoders=1, limits=Limits(decode_timeout_s=2)))
    good = film(folder / f"{manner}.mp4").read_bytes()

    async def ask() -> list[np.ndarray | ItemRefused]:
        await engine.load("main", publish(folder / f"encoder-{manner}", VIDEO))
        contents = [good, good + b":" + manner.encode(), good]
        return await asyncio.gather(*(outcome(engine, content) for content in contents))

    before, bad, after = run(ask())
    run(engine.close())
    assert isinstance(bad, ItemRefused)
    assert re.fullmatch(reason, bad.reason)
    assert isinstance(before, np.ndarray)
    assert isinstance(after, np.ndarray)
    np.testing.assert_allclose(after, before, atol=1e-6)
