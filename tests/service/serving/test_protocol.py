"""Properties of the message format between the gateway and replicas."""

from __future__ import annotations

import contextlib
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.serving.protocol import pack, unpack

vectors = arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=5), elements=st.floats(width=32))


@given(st.lists(st.fixed_dictionaries({"embedding": vectors, "content": st.binary(), "name": st.text()})))
def test_unpack_restores_what_pack_serialized(items: list[dict[str, Any]]) -> None:
    back = unpack(pack({"items": items}))["items"]
    assert len(back) == len(items)
    for one, other in zip(back, items, strict=True):
        np.testing.assert_array_equal(one["embedding"], other["embedding"])
        assert (one["content"], one["name"]) == (other["content"], other["name"])


@given(st.binary())
def test_arbitrary_bytes_are_a_message_or_raise_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(unpack(data), dict)


def test_unsupported_values_are_rejected() -> None:
    with pytest.raises(TypeError, match="set cannot be serialized"):
        pack({"a": {1}})
