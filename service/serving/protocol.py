"""Messages between the gateway and replicas: MessagePack, since JSON cannot hold bytes. Does not import torch.

call      {"slot", "items": [{"content"} | {"uri"}], "want": {…}, "deadline_s", "form"}
reply     {"encoder", "items": [{"embedding", …}]}, or encoded by the replica {"encoder", "content": bytes}
error     {"error": kind, "message", …}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np

MEDIA_TYPE = "application/msgpack"
ARROW, PNG = "application/vnd.apache.arrow.stream", "image/png"  # media types that replicas encode
SLOTS = MAIN, CANDIDATE = "main", "candidate"

_ARRAY = 1  # MessagePack extension code


def pack(message: Mapping[str, Any]) -> bytes:
    """Serialize a message; arrays become little-endian float32 with their shape."""
    packed: bytes = msgpack.packb(message, default=_encode)
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Deserialize a message. Raises ValueError if `data` was not produced by `pack`."""
    try:
        message = msgpack.unpackb(data, ext_hook=_decode)
    except Exception as error:  # msgpack raises a dozen types
        raise ValueError(f"not an inference message: {error}") from None
    if not isinstance(message, dict):
        raise ValueError("not an inference message")
    return message


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, "<f4")
        return msgpack.ExtType(_ARRAY, msgpack.packb(array.shape) + array.tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be serialized")


def _decode(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise ValueError(f"extension {code}")
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    shape = unpacker.unpack()
    return np.frombuffer(data, "<f4", offset=unpacker.tell()).reshape(shape)
