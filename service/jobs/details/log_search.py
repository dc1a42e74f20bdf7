"""Search a log, and read ranges of it backwards and forwards. Offsets are in bytes."""

from __future__ import annotations

from collections.abc import Iterator

from service.jobs.details.schemas import LogMatch, LogMatches, LogRange
from service.jobs.execution.log_sources import LogSource
from service.web.bounded_calls import report_progress
from service.web.formats import ANSI

MAX_LINE = 2000  # characters of a line that a match shows


def search(log: LogSource, text: str, limit: int) -> LogMatches:
    """Find the lines that contain the search text. Case and colour codes are ignored."""
    found: list[LogMatch] = []
    sought, number = text.casefold(), 0
    for number, (offset, line) in enumerate(_lines(log), start=1):
        plain = ANSI.sub("", line)
        if sought in plain.casefold():
            if len(found) == limit:
                return LogMatches(items=found, lines=number - 1, complete=False)
            found.append(LogMatch(line=number, offset=offset, text=plain[:MAX_LINE]))
    return LogMatches(items=found, lines=number, complete=True)


def _lines(log: LogSource) -> Iterator[tuple[int, str]]:
    """Yield (offset, line) for each line of a log, which is read in chunks."""
    offset, rest, rest_at = 0, b"", 0
    while True:
        report_progress()
        content = log.read_raw(offset)
        if not content:
            break
        offset += len(content)
        *whole, rest = (rest + content).split(b"\n")
        for line in whole:
            yield rest_at, line.decode(errors="replace")
            rest_at += len(line) + 1
    if rest:
        yield rest_at, rest.decode(errors="replace")


def before(log: LogSource, end: int, size: int) -> LogRange:
    """Return about `size` bytes that end at an offset, starting on a line boundary. `end` may exceed the log's size."""
    end = min(end, log.size())
    start = max(0, end - size)
    content = b"".join(_pieces(log, start, end))
    if start and (line_end := content.find(b"\n")) >= 0:
        start += line_end + 1
        content = content[line_end + 1 :]
    return LogRange(text=content.decode(errors="replace"), start=start, end=end)


def after(log: LogSource, start: int, size: int) -> LogRange:
    """Return about `size` bytes starting at an offset, ending on a line boundary unless the log ends first."""
    content = b"".join(_pieces(log, start, start + size))
    if len(content) == size and (line_end := content.rfind(b"\n")) >= 0:
        content = content[: line_end + 1]
    return LogRange(text=content.decode(errors="replace"), start=start, end=start + len(content))


def _pieces(log: LogSource, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        content = log.read_raw(start)[: end - start]
        if not content:
            return
        yield content
        start += len(content)
