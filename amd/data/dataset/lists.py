"""Parse list files with one sample per line: `path label` (VideoMAE) or `path total_frames label` (frame folders).

Numbers come last, so paths may contain spaces without quotes. Lines are parsed with pyarrow, one block at a time: a
million lines take a second or two. Does not access the listed files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from amd.data.dataset.manifest import MAX_PROBLEMS, ManifestError, Names, capped

BLOCK = 16 << 20
_BLANK, _NEWLINE = " \t\r\n", 10
_MAX_DIGITS = 18
_NOT_AN_INTEGER = -2  # smaller than every valid number


class ParsedList(NamedTuple):
    names: Names
    frames: np.ndarray | None  # (N,) int32
    labels: np.ndarray  # (N,) int64


class _Block(NamedTuple):
    paths: bytes
    lengths: np.ndarray  # (n,) int32
    frames: np.ndarray  # (n,) int32, zeros when the list has no frame counts
    labels: np.ndarray


def parse_list(blocks: Iterable[bytes], url: str, *, with_frames: bool) -> ParsedList:
    """Parse a list file given as blocks of bytes.

    Raises ManifestError with file:line, the rule and the remedy for each invalid line.
    """
    paths = bytearray()  # grows in place: the text is never in memory twice
    lengths, frames, labels = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    problems: list[str] = []
    broken = 0
    number = 1
    for text in _whole_lines(blocks):
        lines = _lines(text)
        block, bad = _parse(lines, with_frames)
        paths += block.paths
        lengths.append(block.lengths)
        frames.append(block.frames)
        labels.append(block.labels)
        broken += len(bad)
        for line in bad[: MAX_PROBLEMS - len(problems)]:
            shown = lines[int(line)].as_buffer().to_pybytes().decode("utf-8", "replace").strip()
            problems.append(f"{url}:{number + line}: {_line_error(shown, with_frames)}")
        number += len(lines)
    if broken:
        raise ManifestError(capped(problems, broken))
    counts = np.concatenate(frames) if with_frames else None
    return ParsedList(Names(paths, np.concatenate(lengths)), counts, np.concatenate(labels))


def line_numbers(blocks: Iterable[bytes], records: Iterable[int]) -> dict[int, int]:
    """Return the 1-based line number of each given record; blank lines do not count as records."""
    remaining = sorted(set(records), reverse=True)
    found: dict[int, int] = {}
    record, line = -1, 0
    for text in _whole_lines(blocks):
        for content in text.splitlines():
            if not remaining:
                return found
            line += 1
            record += bool(content.strip())
            if content.strip() and record == remaining[-1]:
                found[remaining.pop()] = line
    return found


def _whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Regroup blocks so that each ends with a newline; strip a byte order mark."""
    rest, first = b"", True
    for block in blocks:
        if first:
            block, first = block.removeprefix(b"\xef\xbb\xbf"), False
        whole, newline, tail = block.rpartition(b"\n")
        if newline:
            yield rest + whole + newline
            rest = tail
        else:
            rest += block
    if rest:
        yield rest + b"\n"


def _lines(text: bytes) -> Any:
    """Return the lines of a block as an Arrow array of strings, which may not be valid UTF-8."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == _NEWLINE) + 1
    offsets = np.concatenate(([0], ends))
    lines = pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(text))
    return pc.ascii_trim(lines, _BLANK)


def _parse(lines: Any, with_frames: bool) -> tuple[_Block, np.ndarray]:
    """Parse lines; also return the indices of invalid lines. Blank lines are skipped."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = 2 if with_frames else 1
    fields = pc.ascii_split_whitespace(lines, max_splits=numbers, reverse=True)
    complete = np.asarray(pc.list_value_length(fields)) == numbers + 1
    paths, *counts, labels = (pc.list_element(fields.filter(complete), field) for field in range(numbers + 1))
    labels = _integers(labels)
    frames = _integers(counts[0]) if with_frames else np.zeros(len(labels), np.int64)
    good = labels >= -1
    if with_frames:
        good &= (frames > 0) & (frames < 2**31)
    bad = np.asarray(pc.binary_length(lines)) > 0
    bad[np.flatnonzero(complete)[good]] = False
    paths = paths.filter(pa.array(good)).cast(pa.large_binary())
    lengths = np.asarray(pc.binary_length(paths), np.int32)
    block = _Block(b"".join(paths.to_pylist()), lengths, frames[good].astype(np.int32), labels[good])
    return block, np.flatnonzero(bad)


def _integers(texts: Any) -> np.ndarray:
    """Convert strings to integers; strings other than integers of up to 18 digits become _NOT_AN_INTEGER."""
    import pyarrow as pa
    import pyarrow.compute as pc

    valid = pc.match_substring_regex(texts, f"^-?[0-9]{{1,{_MAX_DIGITS}}}$")
    return np.asarray(pc.if_else(valid, texts, str(_NOT_AN_INTEGER)).cast(pa.int64()))


def _line_error(line: str, with_frames: bool) -> str:
    fields = line.split()
    form = "path total_frames label" if with_frames else "path label"
    shown = line if len(line) <= 120 else line[:117] + "…"
    needed = 3 if with_frames else 2
    if len(fields) < needed:
        return f"{shown!r} has {len(fields)} of {needed} fields; write `{form}`, with label -1 if it has none"
    if not _is_label(fields[-1]):
        label = f"label {fields[-1]!r} is not an integer of at least -1"
        return f"{label}; write `{form}`, with the label last, -1 if it has none"
    return f"total_frames {fields[-2]!r} is not an integer of at least 1; write `{form}`"


def _is_label(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= _MAX_DIGITS and int(text) >= -1
