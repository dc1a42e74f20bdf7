"""Format times and durations as text."""

from __future__ import annotations

from datetime import UTC, datetime


def ago(at: datetime) -> str:
    """Return the time since `at`, such as `5 min ago`."""
    return f"{duration((datetime.now(UTC) - at).total_seconds())} ago"


def duration(seconds: float) -> str:
    """Return a duration in its largest unit, rounded."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
