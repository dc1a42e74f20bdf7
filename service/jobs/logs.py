"""A job's log, from the chunks that its runner left on the storage root. Offsets are bytes of one attempt's log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from amd.storage import join, listdir, read_bytes
from service.jobs.execution.protocol import JobFolder

READ_BYTES = 256 * 1024
TAIL_BYTES = 4 * 2**20  # at most so much is looked through for the last lines


class Piece(NamedTuple):
    text: str
    end: int
    """Where the next piece begins."""


def read(folder: JobFolder, attempt: int, offset: int, *, whole_lines: bool = True) -> Piece:
    """What stands at an offset, up to READ_BYTES or the end: of whole lines, so that no character is cut.

    An empty piece where there is nothing (yet).
    """
    found = bytearray()
    for start, name in _chunks(folder, attempt, offset):
        if start > offset + len(found):
            break  # a gap: the chunk between is still on its way
        found += read_bytes(join(folder.logs(attempt), name))[offset + len(found) - start :]
        if len(found) >= READ_BYTES:
            break
    line_end = found.rfind(b"\n") + 1
    if whole_lines and line_end:
        del found[line_end:]
    return Piece(found.decode(errors="replace"), offset + len(found))


def pieces(folder: JobFolder, attempt: int, offset: int = 0) -> Iterator[str]:
    """All that stands there, in pieces."""
    while True:
        piece = read(folder, attempt, offset)
        if piece.end == offset:
            return
        yield piece.text
        offset = piece.end


def tail_offset(folder: JobFolder, attempt: int, lines: int) -> int:
    """Where the last lines begin."""
    chunks = list(_chunks(folder, attempt, 0))
    seen = looked = 0
    for start, name in reversed(chunks):
        chunk = read_bytes(join(folder.logs(attempt), name))
        position = len(chunk)
        while (position := chunk.rfind(b"\n", 0, position)) >= 0:
            if seen == lines:
                return start + position + 1
            seen += 1
        looked += len(chunk)
        if looked >= TAIL_BYTES:
            return start
    return 0


def _chunks(folder: JobFolder, attempt: int, offset: int) -> Iterator[tuple[int, str]]:
    """(first byte, name) of the chunks from the one that holds an offset."""
    names = [name for name in listdir(folder.logs(attempt)) if name.endswith(".log")]
    starts = [int(name.removesuffix(".log")) for name in names]
    first = max((place for place, start in enumerate(starts) if start <= offset), default=0)
    yield from zip(starts[first:], names[first:], strict=True)
