"""Read the logs of a job's attempts and ranks from chunks under the storage root. Offsets are in bytes.

A `folder` contains the chunks of one log: `JobFolder.logs` for an attempt, or `rank_log_folder` for a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from amd.storage import join, listdir, read_bytes

READ_BYTES = 256 * 1024
MAX_TAIL_BYTES = 4 * 2**20  # maximum number of bytes read to find the last lines


class LogSlice(NamedTuple):
    """A slice of a log."""

    text: str
    end: int
    """Offset of the next slice."""


class LogReader:
    """Reads a log from an offset onwards. Lists chunks only once: each one starts where the previous one ends."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._offset: int | None = None  # of `_unread`; None until the log is located
        self._unread, self._next = bytearray(), 0

    def read(self, offset: int, *, whole_lines: bool = True) -> LogSlice:
        """Read about READ_BYTES from an offset, in whole lines so that no character is split.

        Without `whole_lines`, the last slice of the log may end with an incomplete line. Returns an empty slice if
        nothing has been stored at that offset yet.
        """
        if offset != self._offset:
            self._locate(offset)
        is_end = False
        while self._offset is not None and len(self._unread) < READ_BYTES:
            try:
                chunk = read_bytes(join(self._folder, f"{self._next:016d}.log"))
            except FileNotFoundError:
                is_end = True
                break
            self._unread += chunk
            self._next += len(chunk)
        found = cut(bytearray(self._unread), offset, whole_lines or not is_end)
        if self._offset is not None:
            del self._unread[: found.end - offset]
            self._offset = found.end
        return found

    def _locate(self, offset: int) -> None:
        """Find the stored chunk that contains the offset, or else the chunk that will contain it."""
        self._offset, self._unread = None, bytearray()
        start, name = next(_chunks(self._folder, offset), (0, ""))
        chunk = read_bytes(join(self._folder, name)) if name else b""
        if start <= offset <= start + len(chunk):
            self._offset, self._next, self._unread = offset, start + len(chunk), bytearray(chunk[offset - start :])


def cut(found: bytearray, offset: int, whole_lines: bool) -> LogSlice:
    """Return the bytes found at an offset as a slice; with `whole_lines`, up to the last line break."""
    line_end = found.rfind(b"\n") + 1
    if whole_lines and line_end:
        del found[line_end:]
    return LogSlice(found.decode(errors="replace"), offset + len(found))


def read_raw(folder: str, offset: int) -> bytes:
    """Read about READ_BYTES from an offset, stopping at the end of a chunk; empty if nothing is stored there yet."""
    found = bytearray()
    for start, name in _chunks(folder, offset):
        if start > offset + len(found):
            break  # a gap: the chunk in between has not been written yet
        found += read_bytes(join(folder, name))[offset + len(found) - start :]
        if len(found) >= READ_BYTES:
            break
    return bytes(found)


def size(folder: str) -> int:
    """Return the stored size of a log in bytes."""
    chunks = list(_chunks(folder, 0))
    if not chunks:
        return 0
    start, name = chunks[-1]
    return start + len(read_bytes(join(folder, name)))


def pieces(folder: str, offset: int = 0) -> Iterator[str]:
    """Yield the text from an offset to the end in chunks."""
    reader = LogReader(folder)
    while True:
        found = reader.read(offset)
        if found.end == offset:
            return
        yield found.text
        offset = found.end


def tail_offset(folder: str, lines: int) -> int:
    """Return the offset at which the last `lines` lines start."""
    chunks = list(_chunks(folder, 0))
    count = bytes_read = 0
    for start, name in reversed(chunks):
        chunk = read_bytes(join(folder, name))
        position = len(chunk)
        while (position := chunk.rfind(b"\n", 0, position)) >= 0:
            if count == lines:
                return start + position + 1
            count += 1
        bytes_read += len(chunk)
        if bytes_read >= MAX_TAIL_BYTES:
            return start
    return 0


def _chunks(folder: str, offset: int) -> Iterator[tuple[int, str]]:
    """Yield (first byte, name) for each chunk, starting with the one that contains the offset."""
    names = [name for name in listdir(folder) if name.endswith(".log")]
    starts = [int(name.removesuffix(".log")) for name in names]
    first = max((index for index, start in enumerate(starts) if start <= offset), default=0)
    yield from zip(starts[first:], names[first:], strict=True)
