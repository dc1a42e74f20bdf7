"""Files for the console's map of an embedded data set: thumbnails, and a two-dimensional layout.

    thumbnails/0000000000-0000004096.bin   4097 offsets (int64, little-endian), then WebP images of records 0 to 4095
    map.json                               positions, clusters and scores of at most 50,000 samples

Readers limit sizes and check values, because the control plane serves these files to browsers. Imports neither torch
nor Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from amd.downstream.embedding.files import Numbers, span_name
from amd.storage import join, read_range, write_bytes

MAX_POINTS = 50_000
MAX_MAP_BYTES = 2**26
MAX_LOCATION = 200  # characters per location in the map
MAX_THUMBNAIL_BYTES = 2**16
THUMBNAIL_FORMAT = "WEBP"
OFFSET = np.dtype("<i8")

Number = Annotated[int, Field(ge=0, le=2**53)]
Label = Annotated[int, Field(ge=-(2**53), le=2**53)]
Coordinate = Annotated[float, Field(allow_inf_nan=False)]
Location = Annotated[str, Field(max_length=MAX_LOCATION)]


class DamagedMap(Exception):
    """Raised for a map file with content that no embed job writes."""


class EmbeddingMap(BaseModel):
    """Two-dimensional layout of an embedded data set. Lists have one value per sample, in manifest order."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    encoder: str = Field(max_length=300)
    """ID of the encoder."""
    layout: Literal["pca", "umap"]
    """Method that computed the positions; pca if the data set is too small for the requested method."""
    requested_layout: Literal["pca", "umap"]
    """Layout requested in the job's config."""
    samples: Number
    """Number of embedded samples. If there are more than 50,000, the map contains an evenly spaced subset."""
    clusters: int = Field(ge=1, le=64)
    """Number of clusters."""
    explained_variance: tuple[Coordinate, Coordinate] | None = None
    """Share of the variance along each axis, from 0 to 1; null unless the layout is pca."""
    records: list[Number] = Field(max_length=MAX_POINTS)
    """Record numbers."""
    locations: list[Location] = Field(max_length=MAX_POINTS)
    """Locations; an ellipsis replaces the beginning of long ones."""
    labels: list[Label | None] = Field(max_length=MAX_POINTS)
    """Labels; null for unlabelled samples."""
    x: list[Coordinate] = Field(max_length=MAX_POINTS)
    """Horizontal positions."""
    y: list[Coordinate] = Field(max_length=MAX_POINTS)
    """Vertical positions."""
    cluster: list[Annotated[int, Field(ge=0, le=63)]] = Field(max_length=MAX_POINTS)
    """Cluster numbers, starting at 0."""
    score: list[Coordinate] = Field(max_length=MAX_POINTS)
    """Cosine similarities to the center of the sample's cluster; low for outliers."""

    @model_validator(mode="after")
    def _equal_lengths(self) -> EmbeddingMap:
        columns = (self.locations, self.labels, self.x, self.y, self.cluster, self.score)
        if {len(column) for column in columns} != {len(self.records)}:
            raise ValueError(f"records has {len(self.records)} values, but another list has a different number")
        return self


def map_url(output: str) -> str:
    return join(output, "map.json")


def write_map(output: str, embedding_map: EmbeddingMap) -> None:
    write_bytes(map_url(output), embedding_map.model_dump_json().encode())


def read_map(output: str) -> EmbeddingMap:
    """Read the map of an embedded data set. Raises FileNotFoundError if missing, or DamagedMap if damaged."""
    content = read_range(map_url(output), 0, MAX_MAP_BYTES + 1)
    if len(content) > MAX_MAP_BYTES:
        raise DamagedMap(f"{map_url(output)} is larger than {MAX_MAP_BYTES} bytes")
    try:
        return EmbeddingMap.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "its content"
        raise DamagedMap(f"{map_url(output)} is damaged: {field}: {first['msg']}") from None


def shortened_location(name: str) -> str:
    """Shorten a location and make it valid UTF-8. Keeps the end of the path, which distinguishes samples."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text if len(text) <= MAX_LOCATION else "…" + text[1 - MAX_LOCATION :]


def thumbnails_url(output: str, span: range) -> str:
    return join(output, "thumbnails", f"{span_name(span)}.bin")


def write_thumbnails(output: str, span: range, images: Mapping[int, bytes]) -> None:
    """Write a span's images, given by record number. Records without an image have equal start and stop offsets."""
    sizes: Numbers = np.array([len(images.get(record, b"")) for record in span], OFFSET)
    offsets = OFFSET.itemsize * (len(span) + 1) + np.concatenate([[0], np.cumsum(sizes)])
    content = b"".join(images.get(record, b"") for record in span)
    write_bytes(thumbnails_url(output, span), offsets.astype(OFFSET).tobytes() + content)


def read_thumbnail(output: str, span: range, record: int) -> bytes | None:
    """Return a record's thumbnail, or None if it has none.

    Raises FileNotFoundError if the span has no thumbnails, or DamagedMap if the file does not contain a WebP image of
    limited size for the record.
    """
    url = thumbnails_url(output, span)
    position = OFFSET.itemsize * (record - span.start)
    header = read_range(url, position, position + 2 * OFFSET.itemsize)
    if len(header) != 2 * OFFSET.itemsize:
        raise DamagedMap(f"{url} is damaged: it ends before the offsets of record {record}")
    start, stop = np.frombuffer(header, OFFSET).tolist()
    if start == stop:
        return None
    if not 0 < start < stop <= start + MAX_THUMBNAIL_BYTES:
        raise DamagedMap(f"{url} is damaged: the offsets of record {record} are {start} and {stop}")
    image = read_range(url, start, stop)
    if len(image) != stop - start or not is_webp(image):
        raise DamagedMap(f"{url} is damaged: record {record} has no WebP image")
    return image


def is_webp(content: bytes) -> bool:
    return content[:4] == b"RIFF" and content[8:12] == THUMBNAIL_FORMAT.encode()
