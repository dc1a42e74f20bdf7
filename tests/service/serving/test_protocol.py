"""Tests for the message format used between the gateway and replicas."""

from __future__ import annotations

import contextlib
from typing import Any, get_args

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.serving.protocol import pack, pack_refusal, refusal_in, unpack
from service.web.errors import Refusal, RefusalCode

vectors = arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=5), elements=st.floats(width=32))


@given(st.lists(st.fixed_dictionaries({"embedding": vectors, "content": st.binary(), "name": st.text()})))
def test_unpacking_a_packed_message_restores_it(items: list[dict[str, Any]]) -> None:
    back = unpack(pack({"items": items}))["items"]
    assert len(back) == len(items)
    for one, other in zip(back, items, strict=True):
        np.testing.assert_array_equal(one["embedding"], other["embedding"])
        assert (one["content"], one["name"]) == (other["content"], other["name"])


@given(st.binary())
def test_arbitrary_bytes_are_unpacked_or_raise_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(unpack(data), dict)


def test_unsupported_values_are_rejected() -> None:
    with pytest.raises(TypeError, match="set cannot be serialized"):
        pack({"a": {1}})


@given(
    st.sampled_from(get_args(RefusalCode)),
    st.text(),
    st.none() | st.integers(0, 255),
    st.none() | st.floats(0, 60),
)
def test_a_refusal_is_unchanged_by_a_round_trip(
    code: RefusalCode, message: str, index: int | None, retry_after: float | None
) -> None:
    sent = Refusal(code, message, index, retry_after)
    received = refusal_in(unpack(pack_refusal(sent)))
    assert received is not None
    assert (received.code, received.message, received.extra) == (sent.code, sent.message, sent.extra)


def test_only_error_replies_are_refusals_and_unknown_codes_count_as_outages() -> None:
    assert refusal_in({"encoder": "a", "items": []}) is None
    unknown = refusal_in({"error": "of another version"})
    assert unknown is not None
    assert unknown.code == "encoder_unavailable"
