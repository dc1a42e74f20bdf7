"""Nearest neighbours among the embeddings that a job has left: exact, by cosine, one file after the other.

What was read stays in memory up to a limit of bytes; a larger set is read anew beyond it, and never held whole. Knows
nothing of HTTP nor of deployments.
Shapes: r rows of a file, D width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amd.data.dataset.manifest import Names
from amd.downstream.embedding.files import EmbeddingIndex, Rows, Vectors, read_index, read_rows
from service.web.errors import NotPossible

HELD_BYTES = 256 * 2**20
HELD_INDEXES = 16


class Neighbour(NamedTuple):
    score: float
    """Cosine, -1 to 1."""
    record: int
    location: str
    label: int | None


class Shelf:
    """Files that were read, by their set; any thread may ask.

    For a new set others make room, the longest unused first. A set's own files stay: read from start to end each time,
    one that is too large would push out what it needs next.
    """

    def __init__(self, limit_bytes: int = HELD_BYTES) -> None:
        self._limit, self._held = limit_bytes, 0
        self._sets: OrderedDict[str, dict[int, Rows]] = OrderedDict()
        self._indexes: OrderedDict[str, EmbeddingIndex] = OrderedDict()
        self._lock = threading.Lock()

    def index(self, output: str) -> EmbeddingIndex:
        """Raises FileNotFoundError."""
        with self._lock:
            found = self._indexes.get(output)
        if found is None:
            found = read_index(output)
            with self._lock:
                self._indexes[output] = found
                while len(self._indexes) > HELD_INDEXES:
                    self._indexes.popitem(last=False)
        return found

    def rows(self, output: str, spans: Iterable[range]) -> Iterator[Rows]:
        """Raises FileNotFoundError."""
        for span in spans:
            with self._lock:
                found = self._sets.get(output, {}).get(span.start)
            if found is None:
                found = read_rows(output, span)
                self._keep(output, span, found)
            yield found

    @property
    def held_bytes(self) -> int:
        return self._held

    def _keep(self, output: str, span: range, rows: Rows) -> None:
        with self._lock:
            mine = self._sets.setdefault(output, {})
            self._sets.move_to_end(output)
            if span.start in mine:
                return
            while self._held + rows.nbytes > self._limit and next(iter(self._sets)) != output:
                _, gone = self._sets.popitem(last=False)
                self._held -= sum(each.nbytes for each in gone.values())
            if self._held + rows.nbytes <= self._limit:
                mine[span.start] = rows
                self._held += rows.nbytes


class Question(NamedTuple):
    vector: Vectors  # (D,), of length 1
    itself: int | None = None
    """A record that is no answer: the one that was asked for."""


def of_vector(index: EmbeddingIndex, values: Sequence[float] | npt.NDArray[np.floating]) -> Question:
    """Raises NotPossible for another width, and for a vector without a direction."""
    vector = np.asarray(values, np.float64)
    if vector.shape != (index.width,):
        raise NotPossible(f"the vector has {vector.size} values; those of {index.encoder} have {index.width}")
    largest = np.abs(vector).max()
    if not largest > 0 or not np.isfinite(largest):
        raise NotPossible("the vector has no direction: all of it is zero, or some of it is no number")
    vector = vector / largest
    return Question(np.asarray(vector / np.linalg.norm(vector), np.float32))


def of_record(shelf: Shelf, output: str, index: EmbeddingIndex, record: int) -> Question:
    """Raises NotPossible for a record that is not there, or could not be read."""
    spans = [file.span for file in index.files if record in file.span]
    for rows in shelf.rows(output, spans):
        at = int(np.searchsorted(rows.records, record))
        if at < len(rows.records) and rows.records[at] == record:
            return Question(rows.vectors[at], record)
    for bad in index.bad:
        if bad["record"] == record:
            raise NotPossible(f"record {record} could not be read: {bad['location']} {bad['reason']}")
    raise NotPossible(f"record {record} is not there; the set has records 0 to {index.samples - 1}")


def of_location(shelf: Shelf, output: str, index: EmbeddingIndex, location: str) -> Question:
    """Raises NotPossible."""
    name = location.encode("utf-8", "surrogateescape")
    for rows in shelf.rows(output, (file.span for file in index.files)):
        at = _row_of(rows.locations, name)
        if at is not None:
            return Question(rows.vectors[at], int(rows.records[at]))
    for bad in index.bad:
        if bad["location"] == location:
            raise NotPossible(f"{location} could not be read: {bad['reason']}")
    raise NotPossible(f"{location!r} is not in this set; locations are spelled as in its files")


def _row_of(names: Names, name: bytes) -> int | None:
    at = names.blob.find(name)
    while at >= 0 and name:
        row = int(np.searchsorted(names.offsets, at))
        if row < len(names) and names.offsets[row] == at and names.offsets[row + 1] == at + len(name):
            return row
        at = names.blob.find(name, at + 1)
    return None


def nearest(files: Iterable[Rows], question: Question, k: int) -> list[Neighbour]:
    """The k rows of the highest cosine, the nearest first; of equal ones the lower record."""
    best = list[Neighbour]()
    for rows in files:
        scores = np.clip(rows.vectors @ question.vector, -1.0, 1.0)
        order = np.lexsort((rows.records, -scores))[: k + 1]  # one more: it may be the record itself
        best += [
            Neighbour(float(scores[row]), int(rows.records[row]), _shown(rows.locations[row]), rows.label(row))
            for row in order.tolist()
            if rows.records[row] != question.itself
        ]
        best = sorted(best, key=lambda found: (-found.score, found.record))[:k]
    return best


def _shown(name: str) -> str:
    """Bytes that are no UTF-8 cannot go over the wire."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
