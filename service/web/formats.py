"""Formatters for numbers, times and values in HTML pages."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

DASH = "–"
ANSI = re.compile(r"\x1b(?:\[[0-9;:?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")  # colour codes of a terminal


def now() -> datetime:
    return datetime.now(UTC)


def duration(seconds: float | None) -> str:
    """Format a duration: `42 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    total = max(0, round(seconds))
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            rest = total % size // part
            return f"{total // size} {name} {rest} {part_name}" if rest else f"{total // size} {name}"
    return f"{total} s"


def between(start: datetime | None, end: datetime | None) -> str:
    """Format the time between two moments, or until now if the second is None."""
    return DASH if start is None else duration(((end or now()) - start).total_seconds())


def elapsed_s(start: datetime) -> int:
    """Return the whole seconds from a moment until now."""
    return max(0, round((now() - start).total_seconds()))


def ago(moment: datetime | None) -> str:
    """Format a moment relative to now, in a single unit."""
    if moment is None:
        return DASH
    seconds = (now() - moment).total_seconds()
    if seconds < 0:
        return f"in {duration(-seconds)}"
    if seconds < 10:
        return "now"
    for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} ago"
    return "now"


def moment(value: datetime | None) -> str:
    return DASH if value is None else value.strftime("%Y-%m-%d %H:%M:%S UTC")


def number(value: Any, digits: int = 4) -> str:
    """Format a number with `digits` significant digits; convert other values to text."""
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    return f"{value:.{digits}g}" if math.isfinite(value) else "not finite"


def amount(value: float | None) -> str:
    """Format an amount with at most one decimal: `12`, `1 234.5`."""
    return DASH if value is None else f"{value:,.1f}".removesuffix(".0").replace(",", "\u202f")


def hours(value: float) -> str:
    """Format a number of hours; below one hour, in minutes and seconds: `1 234.5 h`, `3 min 17 s`, `0 h`."""
    if value >= 1:
        return f"{amount(value)} h"
    return duration(value * 3600) if value else "0 h"


def large(value: float | None) -> str:
    """Format a large number with a suffix: `5.7 M`, `1.2 G`."""
    if value is None:
        return DASH
    for size, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {suffix}"
    return f"{value:.3g}"


def file_size(count: int) -> str:
    """Format a number of bytes: `3.7 kB`, `990 B`."""
    return f"{count} B" if count < 1000 else f"{large(count)}B"


def percent(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def compact(value: Any) -> str:
    """Format a config value on one line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "), default=str)


def ordinal(value: int) -> str:
    suffix = "th" if value % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value}{suffix}"


def plural(count: float, singular: str, plural_form: str | None = None) -> str:
    """Format a number of things: `1 CPU`, `0.5 CPUs`, `3 retries`."""
    digits = number(int(count)) if count == int(count) else f"{count:g}"
    return f"{digits} {singular if count == 1 else plural_form or singular + 's'}"


def shortened(text: Any, length: int = 200) -> str:
    """Truncate long text, so that a name of 10,000 characters does not fill a page."""
    text = str(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def sentence(text: str) -> str:
    """Start a text with a capital letter."""
    return f"{text[:1].upper()}{text[1:]}"


def joined(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def plain(text: str) -> str:
    """Remove terminal colour codes."""
    return ANSI.sub("", text)


FILTERS: dict[str, Callable[..., Any]] = {
    "ago": ago,
    "amount": amount,
    "between": between,
    "compact": compact,
    "duration": duration,
    "elapsed_s": elapsed_s,
    "file_size": file_size,
    "hours": hours,
    "joined": joined,
    "large": large,
    "moment": moment,
    "num": number,
    "ordinal": ordinal,
    "percent": percent,
    "plain": plain,
    "plural": plural,
    "sentence": sentence,
    "shortened": shortened,
}
