"""Features kept on the storage root: computed once for an encoder and a data set, then read.

    features/KEY/rows-00000000.safetensors, rows-00004096.safetensors, …    in any order
    features/KEY/manifest.json                                              last: this is the commit

KEY is a digest of all that decides the features. A folder without a manifest is of a writer that died, or is at work;
it is never read, and the next writer writes the same files. The manifest holds each file's sha256 and the samples that
were left out, so damage is noticed. Knows nothing of encoders, clips or labels: rows of numbers in, the same out.
Shapes: n records of a data set, r rows of a part, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from amd.config import ClipConfig, Interpolation, Precision
from amd.data.faults import Bad
from amd.downstream.arrays import Array, Labels
from amd.storage import exists, join, read_bytes, read_json, remove, write_bytes, write_json

MANIFEST = "manifest.json"
ROWS = 4096  # records a part

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """Features of consecutive records; unreadable ones are named instead."""

    start: int  # the first record's number in the data set's manifest
    values: Array  # (r, D)
    records: Labels  # (r,) their numbers
    bad: list[Bad]


class FeatureKey(BaseModel):
    """All that decides the features of a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: int = 1
    encoder: str
    """sha256 of the weights."""
    data: str
    """Where the samples are: two splits may hold the same names and labels."""
    digest: str
    """Of the data set's manifest."""
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
    """A committed folder whose files are missing or differ from their digests."""


def spans(records: int) -> list[range]:
    """The records of each part."""
    return [range(start, min(start + ROWS, records)) for start in range(0, records, ROWS)]


def kept_parts(folder: str, key: FeatureKey, compute: Callable[[], Iterable[Part]]) -> Iterator[Part]:
    """The parts of a data set: read where they are kept, else computed and kept. After damage some come twice."""
    if exists(join(folder, MANIFEST)):
        try:
            yield from read_parts(folder)
            return
        except DamagedFeatures as damage:
            logger.warning("%s; computing the features again", damage)
    yield from write_parts(folder, key, compute())


def write_parts(folder: str, key: FeatureKey, parts: Iterable[Part]) -> Iterator[Part]:
    """Hand parts on, each once it is written; the manifest follows the last of them."""
    remove(join(folder, MANIFEST))  # what stands there, if anything, is damaged
    files: dict[str, dict[str, Any]] = {}
    for part in parts:
        name, data = f"rows-{part.start:08d}.safetensors", _packed(part)
        write_bytes(join(folder, name), data)
        files[name] = {
            "start": part.start,
            "rows": len(part.records),
            "sha256": hashlib.sha256(data).hexdigest(),
            "left_out": part.bad,
        }
        yield part
    write_json(join(folder, MANIFEST), {"key": key.model_dump(mode="json"), "files": dict(sorted(files.items()))})


def read_parts(folder: str) -> Iterator[Part]:
    """The parts of a committed folder, their digests verified. Raises DamagedFeatures."""
    for name, facts in read_json(join(folder, MANIFEST))["files"].items():
        url = join(folder, name)
        try:
            data = read_bytes(url)
        except FileNotFoundError:
            raise DamagedFeatures(f"{url} is missing") from None
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise DamagedFeatures(f"{url} is damaged (its sha256 is not that of the manifest)")
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise DamagedFeatures(f"{url}: {error}") from None
        yield Part(facts["start"], tensors["values"], tensors["records"], facts["left_out"])


def _packed(part: Part) -> bytes:
    data: bytes = save({"values": np.ascontiguousarray(part.values), "records": part.records})
    return data
