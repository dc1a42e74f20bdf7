"""Files of an embedded data set, written by bulk runs and read by the neighbour search.

    embeddings/0000000000-0000004096.parquet   records 0 to 4095: record, location, label, embedding
    search/0000000000-0000004096.npz           the same as NumPy arrays: unit vectors, records, labels, locations
    index.json                                 written last: marks the set as complete

Does not import torch; only Parquet files need pyarrow.
Shapes: r rows in a span, D width.
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
    """Parquet file that contains the records [start, stop) of a data set."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    start: int
    stop: int
    rows: int
    """Number of readable records."""
    file: str
    """Path to the Parquet file, relative to the output folder."""

    @property
    def span(self) -> range:
        return range(self.start, self.stop)


class EmbeddingIndex(BaseModel):
    """Index of a complete set of embeddings, stored as `index.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    encoder: str
    """ID of the encoder."""
    sha256: str
    """sha256 of the encoder's weights."""
    data: str
    """Location of the samples."""
    digest: str
    """Digest of the data set's manifest."""
    samples: int
    count: int
    """Number of samples embedded."""
    width: int
    normalize: bool
    bad: tuple[dict[str, Any], ...]
    """Record index, location and reason for each sample that could not be read."""
    damaged: tuple[dict[str, Any], ...] = ()
    """Record index, location and damage for each partially decoded video."""
    thumbnails: bool = False
    """Whether the samples have thumbnails."""
    files: tuple[SpanFile, ...]
    made_of: dict[str, Any]
    """Everything that determines the vectors."""


def read_index(output: str) -> EmbeddingIndex:
    """Read the index of an embedded data set. Raises FileNotFoundError if the set is incomplete."""
    return EmbeddingIndex.model_validate(read_json(index_url(output)))


def write_index(output: str, index: EmbeddingIndex) -> None:
    write_json(index_url(output), index.model_dump(mode="json"))


class SearchRows(NamedTuple):
    """Searchable vectors of one span."""

    vectors: Vectors  # (r, D), of length 1; zero embeddings stay zero
    records: Numbers  # (r,)
    labels: Numbers  # (r,), NO_LABEL for unlabelled samples
    locations: Names

    @property
    def nbytes(self) -> int:
        arrays = (self.vectors, self.records, self.labels, self.locations.offsets)
        return sum(array.nbytes for array in arrays) + len(self.locations.blob)

    def label(self, row: int) -> int | None:
        label = int(self.labels[row])
        return None if label == NO_LABEL else label


def unit(vectors: Vectors) -> Vectors:
    """Scale vectors (r, D) to length 1; zero vectors stay zero."""
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


def read_rows(output: str, span: range) -> SearchRows:
    """Read the searchable vectors of a span. Raises FileNotFoundError if the span is missing."""
    with np.load(io.BytesIO(read_bytes(search_url(output, span))), allow_pickle=False) as arrays:
        names = Names(arrays["locations"].tobytes(), arrays["lengths"])
        return SearchRows(arrays["vectors"], arrays["records"], arrays["labels"], names)


def plan_spans(samples: int, rows_per_file: int) -> Sequence[range]:
    """Split the records into spans."""
    return [range(start, min(start + rows_per_file, samples)) for start in range(0, samples, rows_per_file)]
