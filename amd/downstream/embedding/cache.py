"""Feature cache under the storage root: an encoder's features on a data set are computed once, then read.

    features/KEY/rows-00000000.safetensors, rows-00004096.safetensors, …    in any order
    features/KEY/manifest.json                                              written last, as the commit

KEY is a digest of everything that determines the features. A folder without a manifest belongs to a writer that died or
is still running; it is never read, and the next writer writes the same files. The manifest lists the skipped samples
and each file's sha256, so that damage is detected. Rows are stored and returned unchanged.
Shapes: n records in a data set, r rows in a part, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from amd.config import ClipConfig, Interpolation, Precision
from amd.data.faults import DamagedSample, UnreadableSample
from amd.downstream.arrays import Array, Labels
from amd.storage import exists, join, read_bytes, read_file_manifest, remove, write_bytes, write_json

MANIFEST = "manifest.json"
ROWS = 4096  # records per part

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """Features of consecutive records, and the records that could not be read."""

    start: int  # number of the first record in the data set's manifest
    values: Array  # (r, D)
    records: Labels  # (r,) record numbers
    bad: list[UnreadableSample]
    damaged: list[DamagedSample]  # videos for which only the decodable frames were used
    thumbnails: Sequence[bytes] = ()  # r images, if requested; never cached


class FeatureKey(BaseModel):
    """Everything that determines the features of a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: int = 1
    encoder: str
    """sha256 of the weights."""
    data: str
    """Location of the samples; included because two splits may contain the same names and labels."""
    digest: str
    """Digest of the data set's manifest."""
    clip: ClipConfig
    interpolation: Interpolation
    center_fraction: float
    pooling: str
    precision: Precision
    views: str = "1x1"

    def folder(self, root: str) -> str:
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return join(root, "features", hashlib.sha256(text.encode()).hexdigest()[:32])


class DamagedFeatures(Exception):
    """Raised for a committed folder whose files are missing or do not match their digests."""


def spans(records: int) -> list[range]:
    """Split the records into ranges, one per part."""
    return [range(start, min(start + ROWS, records)) for start in range(0, records, ROWS)]


def cached_parts(folder: str, key: FeatureKey, compute: Callable[[], Iterable[Part]]) -> Iterator[Part]:
    """Yield the parts of a data set from the cache, or compute and cache them.

    If a cached file turns out to be damaged partway through, all parts are recomputed, so some may be yielded twice.
    """
    if exists(join(folder, MANIFEST)):
        try:
            yield from read_parts(folder)
            return
        except DamagedFeatures as damage:
            logger.warning("%s; recomputing the features", damage)
    yield from write_parts(folder, key, compute())


def write_parts(folder: str, key: FeatureKey, parts: Iterable[Part]) -> Iterator[Part]:
    """Write and yield each part; the manifest is written after the last one."""
    remove(join(folder, MANIFEST))  # an existing manifest belongs to damaged files
    files: dict[str, dict[str, Any]] = {}
    for part in parts:
        name, data = f"rows-{part.start:08d}.safetensors", _packed(part)
        write_bytes(join(folder, name), data)
        files[name] = {
            "start": part.start,
            "rows": len(part.records),
            "sha256": hashlib.sha256(data).hexdigest(),
            "left_out": part.bad,
            "damaged": part.damaged,
        }
        yield part
    write_json(join(folder, MANIFEST), {"key": key.model_dump(mode="json"), "files": dict(sorted(files.items()))})


def read_parts(folder: str) -> Iterator[Part]:
    """Yield each part of a committed folder after verifying its digest.

    Raises DamagedFeatures if a file is missing or damaged.
    """
    manifest = read_file_manifest(join(folder, MANIFEST), {"start", "sha256", "left_out"})
    if manifest is None:
        raise DamagedFeatures(f"{join(folder, MANIFEST)} is damaged")
    for name, entry in manifest["files"].items():
        url = join(folder, name)
        try:
            data = read_bytes(url)
        except FileNotFoundError:
            raise DamagedFeatures(f"{url} is missing") from None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise DamagedFeatures(f"{url} is damaged: its sha256 does not match the manifest")
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise DamagedFeatures(f"{url}: {error}") from None
        yield Part(entry["start"], tensors["values"], tensors["records"], entry["left_out"], entry.get("damaged", []))


def _packed(part: Part) -> bytes:
    data: bytes = save({"values": np.ascontiguousarray(part.values), "records": part.records})
    return data
