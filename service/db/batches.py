"""Split large collections into batches, because an SQL statement accepts a limited number of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

BATCH = 500


def in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield the items in lists of at most BATCH."""
    remaining = iter(items)
    while batch := list(islice(remaining, BATCH)):
        yield batch
