"""Tests for rendering replies as NumPy arrays and JSON."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

from service.serving.gateway import EncoderReply
from service.serving.requests import InferenceRequest, RequestOptions
from service.serving.responses import NUMPY, check_array, render_reply
from service.web.errors import Refusal

ITEMS: list[dict[str, Any]] = [
    {
        "embedding": np.full(3, item, np.float32),
        "tokens": np.full((4, 3), item + 0.5, np.float32),
        "layers": {"2": np.full((4, 3), item + 0.25, np.float32), "1": np.full((4, 3), item + 0.125, np.float32)},
    }
    for item in range(2)
]


def rendered(options: RequestOptions, media_type: str | None) -> Any:
    response = render_reply(EncoderReply("first", ITEMS, None, 0), InferenceRequest([], options, False), media_type)
    assert response.headers["X-Encoder"] == "first"
    return response.body


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (RequestOptions(), np.stack([item["embedding"] for item in ITEMS])),  # (I, D)
        (RequestOptions(tokens="patch"), np.stack([item["tokens"] for item in ITEMS])),  # (I, N, D)
        (
            RequestOptions(layers=[1, 2]),
            np.stack([[item["layers"][n] for n in "12"] for item in ITEMS]),
        ),  # I, L, N, D
    ],
    ids=["embedding", "tokens", "layers"],
)
def test_an_npy_file_contains_the_requested_output_for_each_item(options: RequestOptions, expected: Any) -> None:
    array = np.load(io.BytesIO(rendered(options, NUMPY)), allow_pickle=False)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected)


def test_an_npy_file_cannot_contain_both_tokens_and_layers() -> None:
    check_array(RequestOptions(tokens="patch"))
    check_array(RequestOptions(layers=[1]))
    with pytest.raises(Refusal, match="holds one array; request either tokens or layers"):
        check_array(RequestOptions(tokens="patch", layers=[1]))


def test_json_contains_all_outputs_in_order() -> None:
    body = json.loads(rendered(RequestOptions(tokens="patch", layers=[1, 2]), None))
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert body["data"][1]["tokens"] == ITEMS[1]["tokens"].tolist()
