"""Tests for results as Arrow streams: values, types and item order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from service.inference.arrow import to_arrow


def result(seed: int) -> dict[str, Any]:
    values = np.random.default_rng(seed).standard_normal((3, 4, 5)).astype(np.float32)  # (outputs, N, D)
    return {"embedding": values[0, 0], "tokens": values[0], "layers": {"2": values[1], "10": values[2]}}


def test_embeddings_tokens_and_layers_are_nested_lists_of_float32() -> None:
    items = [result(seed) for seed in range(3)]
    table = pa.ipc.open_stream(to_arrow("first", items)).read_all()
    assert table.schema.metadata == {b"encoder": b"first"}
    matrix = pa.list_(pa.list_(pa.float32()))
    assert table.schema.field("embedding").type == pa.list_(pa.float32())
    assert table.schema.field("tokens").type == matrix
    assert table.schema.field("layers").type == pa.struct([("2", matrix), ("10", matrix)])
    for row, item in zip(table.to_pylist(), items, strict=True):
        assert row["embedding"] == item["embedding"].tolist()
        assert row["tokens"] == item["tokens"].tolist()
        assert row["layers"] == {name: layer.tolist() for name, layer in item["layers"].items()}


def test_a_result_without_items_is_an_empty_table() -> None:
    assert pa.ipc.open_stream(to_arrow("first", [])).read_all().num_rows == 0
