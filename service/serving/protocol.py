"""What passes between the gateway and a replica: MessagePack, since JSON holds no bytes. Knows neither HTTP nor torch.

call      {"slot", "items": [{"content"} | {"uri"}], "want": {…}, "deadline_s", "form"}
answer    {"encoder", "items": [{"embedding", …}]}, or in a form of the replica's {"encoder", "content": bytes}
refusal   {"error": kind, "message", …}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np

MEDIA_TYPE = "application/msgpack"
ARROW, PNG = "application/vnd.apache.arrow.stream", "image/png"  # forms that a replica writes
SLOTS = MAIN, CANDIDATE = "main", "candidate"

_ARRAY = 1  # MessagePack's number for a type of ours


def pack(message: Mapping[str, Any]) -> bytes:
    """Arrays travel as little-endian float32 with their shape."""
    packed: bytes = msgpack.packb(message, default=_packed)
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Raises ValueError for anything that `pack` did not make."""
    try:
        message = msgpack.unpackb(data, ext_hook=_unpacked)
    except Exception as error:  # it has a dozen kinds of its own
        raise ValueError(f"not a message of the service: {error}") from None
    if not isinstance(message, dict):
        raise ValueError("not a message of the service")
    return message


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, "<f4")
        return msgpack.ExtType(_ARRAY, msgpack.packb(array.shape) + array.tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _unpacked(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise ValueError(f"extension {code}")
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    shape = unpacker.unpack()
    return np.frombuffer(data, "<f4", offset=unpacker.tell()).reshape(shape)
