"""Tests for the formatters of HTML pages and messages."""

from __future__ import annotations

import pytest

from service.web.formats import plural


@pytest.mark.parametrize(
    ("count", "names", "text"),
    [
        (1, ("job",), "1 job"),
        (0, ("job",), "0 jobs"),
        (2, ("retry", "retries"), "2 retries"),
        (1.0, ("CPU",), "1 CPU"),
        (0.5, ("CPU",), "0.5 CPUs"),
        (12345, ("row",), "12\u202f345 rows"),
        (12345.0, ("CPU",), "12\u202f345 CPUs"),
    ],
)
def test_counts_agree_with_their_nouns(count: float, names: tuple[str, ...], text: str) -> None:
    assert plural(count, *names) == text
