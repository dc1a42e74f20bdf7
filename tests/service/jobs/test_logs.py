"""Tests that logs are read completely from chunks, without splitting lines or listing the chunks again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from service.jobs import logs
from service.jobs.logs import LogReader, pieces


def write(folder: Path, text: bytes, sizes: list[int]) -> None:
    """Write a log in chunks, cycling through the given sizes."""
    folder.mkdir(exist_ok=True)
    offset = sum(file.stat().st_size for file in folder.glob("*.log"))
    while offset < len(text):
        chunk = text[offset : offset + sizes[offset % len(sizes)]]
        (folder / f"{offset:016d}.log").write_bytes(chunk)
        offset += len(chunk)


@pytest.mark.parametrize("seed", range(6))
def test_a_growing_log_is_read_completely_from_any_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(logs, "READ_BYTES", 50)
    rng, listings = random.Random(seed), list[str]()
    listed = logs.listdir
    monkeypatch.setattr(logs, "listdir", lambda url: (listings.append(url), listed(url))[1])
    text = b"".join(b"line %d of \xc3\xa4 log\n" % number for number in range(200))
    first = rng.randrange(100, 1000)
    write(tmp_path, text[:first], [rng.randrange(1, 90) for _ in range(5)])
    start = text.index(b"\n", rng.randrange(0, 90)) + 1
    reader, found, offset = LogReader(str(tmp_path)), b"", start
    for size in (first, 2000, len(text)):
        write(tmp_path, text[:size], [rng.randrange(1, 300) for _ in range(5)])
        while (part := reader.read(offset, whole_lines=size < len(text))).end > offset:
            found += part.text.encode()
            offset = part.end
    assert found == text[start:]
    assert len(listings) == 1
    assert "".join(pieces(str(tmp_path))).encode() == text


def test_reading_beyond_the_end_of_a_log_returns_nothing_until_more_is_stored(tmp_path: Path) -> None:
    reader = LogReader(str(tmp_path))
    assert reader.read(10) == ("", 10)
    write(tmp_path, b"0123456\n", [8])
    assert reader.read(10) == ("", 10)
    write(tmp_path, b"0123456\n89\nthe rest\n", [8])
    assert "".join(pieces(str(tmp_path), 11)) == "the rest\n"
    assert reader.read(11).text.startswith("the r")
