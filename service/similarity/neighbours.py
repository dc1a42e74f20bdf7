"""Exact nearest-neighbour search by cosine similarity in a job's embeddings, one file at a time.

Files are cached up to a byte limit. Files beyond the limit are read again for each query, so a set does not have to fit
in memory.
Shapes: r rows in a file, D width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from amd.data.dataset.manifest import Names
from amd.downstream.embedding.files import EmbeddingIndex, SearchRows, Vectors, read_index, read_rows
from service.web.errors import Refusal

MAX_CACHED_BYTES = 256 * 2**20
MAX_CACHED_INDEXES = 16


class Neighbour(NamedTuple):
    """A record and its similarity to the query."""

    score: float
    """Cosine similarity, from -1 to 1."""
    record: int
    location: str
    label: int | None


class EmbeddingCache:
    """A thread-safe cache of embedding files, grouped by set.

    Caching a file evicts other sets, least recently used first, but never files of the same set: sets are read from
    start to end, so a set larger than the cache would always evict the files that are needed next.
    """

    def __init__(self, limit_bytes: int = MAX_CACHED_BYTES) -> None:
        self._limit, self._cached_bytes = limit_bytes, 0
        self._sets: OrderedDict[str, dict[int, SearchRows]] = OrderedDict()
        self._indexes = LRUCache[str, EmbeddingIndex](MAX_CACHED_INDEXES)
        self._lock = threading.Lock()

    def index(self, output: str) -> EmbeddingIndex:
        """Return the index of a set. Raises FileNotFoundError if it does not exist."""
        with self._lock:
            found = self._indexes.get(output)
        if found is None:
            found = read_index(output)
            with self._lock:
                self._indexes[output] = found
        return found

    def rows(self, output: str, spans: Iterable[range]) -> Iterator[SearchRows]:
        """Yield the rows of each span, from the cache or storage. Raises FileNotFoundError if a file is missing."""
        for span in spans:
            with self._lock:
                found = self._sets.get(output, {}).get(span.start)
            if found is None:
                found = read_rows(output, span)
                self._insert(output, span, found)
            yield found

    @property
    def cached_bytes(self) -> int:
        return self._cached_bytes

    def _insert(self, output: str, span: range, rows: SearchRows) -> None:
        with self._lock:
            spans_of_set = self._sets.setdefault(output, {})
            self._sets.move_to_end(output)
            if span.start in spans_of_set:
                return
            while self._cached_bytes + rows.nbytes > self._limit and next(iter(self._sets)) != output:
                _, evicted = self._sets.popitem(last=False)
                self._cached_bytes -= sum(each.nbytes for each in evicted.values())
            if self._cached_bytes + rows.nbytes <= self._limit:
                spans_of_set[span.start] = rows
                self._cached_bytes += rows.nbytes


class NeighbourQuery(NamedTuple):
    """A vector to search for."""

    vector: Vectors  # (D,), unit length
    exclude: int | None = None
    """Record to exclude from the results, because it is the query itself."""


def query_by_vector(index: EmbeddingIndex, values: Sequence[float] | npt.NDArray[np.floating]) -> NeighbourQuery:
    """Build a query from a vector. Raises Refusal if it has the wrong width, is zero or is not finite."""
    vector = np.asarray(values, np.float64)
    if vector.shape != (index.width,):
        raise Refusal(
            "not_possible", f"the vector has {vector.size} values; embeddings of {index.encoder} have {index.width}"
        )
    largest = np.abs(vector).max()
    if not largest > 0 or not np.isfinite(largest):
        raise Refusal("not_possible", "the vector is zero or not finite; its values must be finite and not all zero")
    vector = vector / largest
    return NeighbourQuery(np.asarray(vector / np.linalg.norm(vector), np.float32))


def query_by_record(cache: EmbeddingCache, output: str, index: EmbeddingIndex, record: int) -> NeighbourQuery:
    """Build a query from a record's index. Raises Refusal if the record does not exist or could not be read."""
    spans = [file.span for file in index.files if record in file.span]
    for rows in cache.rows(output, spans):
        position = int(np.searchsorted(rows.records, record))
        if position < len(rows.records) and rows.records[position] == record:
            return NeighbourQuery(rows.vectors[position], record)
    for bad in index.bad:
        if bad["record"] == record:
            raise Refusal("not_possible", f"record {record} could not be read: {bad['location']} {bad['reason']}")
    raise Refusal("not_possible", f"record {record} does not exist; the set has records 0 to {index.samples - 1}")


def query_by_location(cache: EmbeddingCache, output: str, index: EmbeddingIndex, location: str) -> NeighbourQuery:
    """Build a query from a file location. Raises Refusal if the file is not in the set or could not be read."""
    name = location.encode("utf-8", "surrogateescape")
    for rows in cache.rows(output, (file.span for file in index.files)):
        position = _find_location(rows.locations, name)
        if position is not None:
            return NeighbourQuery(rows.vectors[position], int(rows.records[position]))
    for bad in index.bad:
        if bad["location"] == location:
            raise Refusal("not_possible", f"{location} could not be read: {bad['reason']}")
    raise Refusal(
        "not_possible", f"{location!r} is not in this set; use a location exactly as it appears in the set's files"
    )


def _find_location(names: Names, name: bytes) -> int | None:
    position = names.blob.find(name)
    while position >= 0 and name:
        row = int(np.searchsorted(names.offsets, position))
        if row < len(names) and names.offsets[row] == position and names.offsets[row + 1] == position + len(name):
            return row
        position = names.blob.find(name, position + 1)
    return None


def nearest(files: Iterable[SearchRows], query: NeighbourQuery, k: int) -> list[Neighbour]:
    """Return the k rows with the highest cosine similarity, nearest first; ties are ordered by record index."""
    best = list[Neighbour]()
    for rows in files:
        scores = np.clip(rows.vectors @ query.vector, -1.0, 1.0)
        order = np.lexsort((rows.records, -scores))[: k + 1]  # one more, because one may be the excluded record
        best += [
            Neighbour(float(scores[row]), int(rows.records[row]), _printable(rows.locations[row]), rows.label(row))
            for row in order.tolist()
            if rows.records[row] != query.exclude
        ]
        best = sorted(best, key=lambda found: (-found.score, found.record))[:k]
    return best


def _printable(name: str) -> str:
    """Replace bytes that are not valid UTF-8, which JSON cannot represent."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
