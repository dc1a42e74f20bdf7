"""Encode results as Arrow streams. Runs in the replica: pyarrow is not installed in the control plane.

Shapes: I items, N tokens, D width.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa


def to_arrow(encoder: str, items: list[dict[str, Any]]) -> bytes:
    """Encode items as an Arrow stream with one row each; the schema metadata contains the encoder's ID as `encoder`."""
    columns = {name: _column([item[name] for item in items]) for name in items[0]} if items else {}
    table = pa.table(columns).replace_schema_metadata({"encoder": encoder})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _column(values: list[Any]) -> Any:
    """Convert a column's values to Arrow. Arrays become nested float32 lists, without a Python object per value."""
    if isinstance(values[0], np.ndarray):
        stacked = np.stack(values).astype(np.float32, copy=False)
        column = pa.array(stacked.reshape(-1))
        for size in reversed(stacked.shape[1:]):
            offsets = np.arange(0, len(column) + 1, size, dtype=np.int32)
            column = pa.ListArray.from_arrays(pa.array(offsets), column)
        return column
    if isinstance(values[0], dict):
        names = list(values[0])
        return pa.StructArray.from_arrays([_column([value[name] for value in values]) for name in names], names)
    return pa.array(values)
