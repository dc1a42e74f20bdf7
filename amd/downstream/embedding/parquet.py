"""Parquet files of an embedded data set: record, location, label and embedding, with our metadata in the footer."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from amd.data.dataset.manifest import NO_LABEL
from amd.downstream.embedding.cache import Part
from amd.storage import filesystem, retry_on_outage

FOOTER = b"amd"  # key of our metadata in the footer of a Parquet file


def encode_rows(part: Part, names: list[str], labels: Any, footer: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array(np.ascontiguousarray(part.values, np.float32).reshape(-1))
    # Invalid UTF-8 in a name becomes replacement characters; the record number still identifies the sample.
    locations = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    table = pa.table(
        {
            "record": pa.array(part.records, pa.int64()),
            "location": pa.array(locations, pa.string()),
            "label": pa.array(labels, pa.int64(), mask=labels == NO_LABEL),
            "embedding": pa.FixedSizeListArray.from_arrays(values, part.values.shape[1]),
        }
    ).replace_schema_metadata({FOOTER: json.dumps(footer)})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", use_dictionary=False)
    return out.getvalue()


def read_footer(url: str) -> dict[str, Any] | None:
    """Read our metadata from a Parquet file; return None if the file is damaged or was not written by this module."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = filesystem(url)

    def read() -> Any:
        with fs.open(path, "rb") as file:
            return pq.read_schema(file).metadata

    try:
        found: dict[str, Any] = json.loads((retry_on_outage(url, read) or {})[FOOTER])
        return found
    except (pa.ArrowInvalid, KeyError, ValueError):
        return None
