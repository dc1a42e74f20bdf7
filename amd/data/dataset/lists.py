"""Parse list files with one sample per line: `path label` (VideoMAE) or `path total_frames label` (frame folders).

Numbers come last, so paths may contain spaces without quotes. Lines are parsed with numpy, one block at a time: ten
million lines take seconds. Does not access the listed files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from amd.data.dataset.manifest import MAX_PROBLEMS, ManifestError, Names, capped

BLOCK = 16 << 20
_SPACE, _TAB, _RETURN, _NEWLINE, _MINUS, _ZERO = 32, 9, 13, 10, 45, 48
_MAX_DIGITS = 18


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

    Raises ManifestError with file:line, the rule and how to fix it, for each invalid line.
    """
    paths = bytearray()  # grows in place: the text is never in memory twice
    lengths, frames, labels = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    problems: list[str] = []
    broken = 0
    number = 1
    for text in _whole_lines(blocks):
        characters = np.frombuffer(text, np.uint8)
        ends = np.flatnonzero(characters == _NEWLINE)
        starts = np.concatenate(([0], ends[:-1] + 1))
        block, bad = _parse(characters, starts, ends, with_frames)
        paths += block.paths
        lengths.append(block.lengths)
        frames.append(block.frames)
        labels.append(block.labels)
        broken += len(bad)
        for line in bad[: MAX_PROBLEMS - len(problems)]:
            shown = text[starts[line] : ends[line]].decode("utf-8", "replace").strip()
            problems.append(f"{url}:{number + line}: {_line_error(shown, with_frames)}")
        number += len(ends)
    if broken:
        raise ManifestError(capped(problems, broken))
    counts = np.concatenate(frames) if with_frames else None
    return ParsedList(Names(paths, np.concatenate(lengths)), counts, np.concatenate(labels))


def line_numbers(blocks: Iterable[bytes], records: Iterable[int]) -> dict[int, int]:
    """Return the 1-based line number of each record; blank lines are not records."""
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


def _parse(c: np.ndarray, starts: np.ndarray, ends: np.ndarray, with_frames: bool) -> tuple[_Block, np.ndarray]:
    """Parse the lines of one block; also return the indices of invalid lines. Blank lines are skipped."""
    stops = _strip_end(c, starts, ends)
    begins = _strip_start(c, starts, stops)
    filled = stops > begins
    labels, good, stops = _last_number(c, begins, stops)
    good &= labels >= -1
    frames = np.zeros(len(labels), np.int64)
    if with_frames:
        frames, counted, stops = _last_number(c, begins, stops)
        good &= counted & (frames > 0) & (frames < 2**31)
    good &= stops > begins  # the path must not be empty
    bad = np.flatnonzero(filled & ~good)
    keep = filled & good
    begins, stops = begins[keep], stops[keep]
    boundaries = np.zeros(len(c) + 1, np.int8)
    boundaries[begins] = 1
    boundaries[stops] -= 1
    inside = np.cumsum(boundaries[:-1], dtype=np.int8).view(bool)
    lengths = (stops - begins).astype(np.int32)
    return _Block(c[inside].tobytes(), lengths, frames[keep].astype(np.int32), labels[keep]), bad


def _last_number(c: np.ndarray, begins: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parse the integer that ends each line at `stops`.

    Returns the values, whether each line ends with an integer preceded by white space, and where the text before the
    integer ends.
    """
    at = stops - 1
    value = np.zeros(len(stops), np.int64)
    power = np.ones(len(stops), np.int64)
    active = at >= begins
    for _ in range(_MAX_DIGITS):
        character = c[np.maximum(at, 0)]
        active = active & (at >= begins) & (character >= _ZERO) & (character <= _ZERO + 9)
        if not active.any():
            break
        value += np.where(active, (character.astype(np.int64) - _ZERO) * power, 0)
        power = np.where(active, power * 10, power)
        at = at - active
    digits = stops - 1 - at
    character = c[np.maximum(at, 0)]
    minus = (at >= begins) & (character == _MINUS)
    value = np.where(minus, -value, value)
    at = at - minus
    character = c[np.maximum(at, 0)]
    separated = (at >= begins) & ((character == _SPACE) | (character == _TAB))
    good = (digits > 0) & separated
    return value, good, np.where(good, _strip_end(c, begins, at + 1), stops)


def _strip_end(c: np.ndarray, begins: np.ndarray, stops: np.ndarray) -> np.ndarray:
    while True:
        last = c[np.maximum(stops - 1, 0)]
        blank = (stops > begins) & ((last == _SPACE) | (last == _TAB) | (last == _RETURN))
        if not blank.any():
            return stops
        stops = stops - blank


def _strip_start(c: np.ndarray, begins: np.ndarray, stops: np.ndarray) -> np.ndarray:
    while True:
        first = c[np.minimum(begins, len(c) - 1)]
        blank = (stops > begins) & ((first == _SPACE) | (first == _TAB))
        if not blank.any():
            return begins
        begins = begins + blank


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
