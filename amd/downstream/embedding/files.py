"""The embeddings of a data set as files: what a bulk run leaves, and what neighbours are looked for in.

    embeddings/0000000000-0000004096.parquet   records 0 to 4095: record, location, label, embedding
    search/0000000000-0000004096.npz           the same for NumPy: unit vectors, records, labels, locations
    index.json                                 last: with it the set is complete

Torch-free, and all but Parquet is read without pyarrow. Knows nothing of how a vector comes about.
Shapes: r rows of a span, D width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from amd.data.dataset.manifest import NO_LABEL, Names
from amd.storage import join, read_bytes, read_json, write_bytes, write_json

Vectors = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


def span_name(span: range) -> str:
    return f"{span.start:010d}-{span.stop:010d}"


def parquet_url(output: str, span: range) -> str:
    return join(output, "embeddings", f"{span_name(span)}.parquet")


def search_url(output: str, span: range) -> str:
    return join(output, "search", f"{span_name(span)}.npz")


def index_url(output: str) -> str:
    return join(output, "index.json")


class SpanFile(BaseModel):
    """Where the records [start, stop) of the data set are."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    start: int
    stop: int
    rows: int
    """Those that could be read."""
    file: str
    """Parquet, from the output's folder."""

    @property
    def span(self) -> range:
        return range(self.start, self.stop)


class EmbeddingIndex(BaseModel):
    """A complete set of embeddings; `index.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    encoder: str
    """Its id."""
    sha256: str
    """Of its weights."""
    data: str
    """Where the samples were."""
    digest: str
    """Of the data set's manifest."""
    samples: int
    count: int
    """Samples that were embedded."""
    width: int
    normalize: bool
    bad: tuple[dict[str, Any], ...]
    """record, location and reason of each sample that could not be read."""
    files: tuple[SpanFile, ...]
    made_of: dict[str, Any]
    """All that decides the vectors."""


def read_index(output: str) -> EmbeddingIndex:
    """Raises FileNotFoundError where the set is not complete."""
    return EmbeddingIndex.model_validate(read_json(index_url(output)))


def write_index(output: str, index: EmbeddingIndex) -> None:
    write_json(index_url(output), index.model_dump(mode="json"))


class Rows(NamedTuple):
    """What neighbours are looked for in, of one span."""

    vectors: Vectors  # (r, D), of length 1; zero where the embedding is
    records: Numbers  # (r,)
    labels: Numbers  # (r,), NO_LABEL where there is none
    locations: Names

    @property
    def nbytes(self) -> int:
        arrays = (self.vectors, self.records, self.labels, self.locations.offsets)
        return sum(array.nbytes for array in arrays) + len(self.locations.blob)

    def label(self, row: int) -> int | None:
        label = int(self.labels[row])
        return None if label == NO_LABEL else label


def unit(vectors: Vectors) -> Vectors:
    """(r, D) -> the same directions at length 1; what has none stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0), np.float32)


def write_rows(output: str, span: range, vectors: Vectors, records: Numbers, labels: Numbers, names: list[str]) -> None:
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    out = io.BytesIO()
    np.savez(
        out,
        vectors=unit(vectors),
        records=records,
        labels=labels,
        locations=np.frombuffer(b"".join(encoded), np.uint8),
        lengths=np.fromiter(map(len, encoded), np.int64, len(encoded)),
    )
    write_bytes(search_url(output, span), out.getvalue())


def read_rows(output: str, span: range) -> Rows:
    """Raises FileNotFoundError."""
    with np.load(io.BytesIO(read_bytes(search_url(output, span))), allow_pickle=False) as found:
        names = Names(found["locations"].tobytes(), found["lengths"])
        return Rows(found["vectors"], found["records"], found["labels"], names)


def plan(samples: int, rows_per_file: int) -> Sequence[range]:
    """The spans that the records are cut into."""
    return [range(start, min(start + rows_per_file, samples)) for start in range(0, samples, rows_per_file)]
