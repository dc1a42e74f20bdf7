"""Messages between the gateway and replicas, in MessagePack because JSON cannot represent bytes.

Does not import torch.

call      {"slot", "items": [{"content"} | {"uri"}], "want": {…}, "deadline_s", "form", "json"}
reply     {"encoder", "items": [{"embedding", …}], "queue_s", "batch_fill"}, with "content": bytes instead of "items" if
          the replica has serialised the response
refusal   {"error": code, "message"}, with "index" and "reason", or "retry_after"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]
import numpy as np

from service.web.errors import Refusal, RefusalCode

MEDIA_TYPE = "application/msgpack"
ARROW, PNG = "application/vnd.apache.arrow.stream", "image/png"  # media types that replicas encode
SLOTS = MAIN, CANDIDATE = "main", "candidate"

_ARRAY = 1  # MessagePack extension code


def pack(message: Mapping[str, Any]) -> bytes:
    """Serialize a message; arrays become little-endian float32 with their shape."""
    packed: bytes = msgpack.packb(message, default=_encode)
    return packed


def pack_refusal(refusal: Refusal) -> bytes:
    """Serialize a refusal as a reply."""
    return pack({"error": refusal.code, "message": refusal.message, **refusal.extra})


def unpack(data: bytes) -> dict[str, Any]:
    """Deserialize a message. Raises ValueError if `data` was not produced by `pack`."""
    try:
        message = msgpack.unpackb(data, ext_hook=_decode)
    except Exception as error:  # msgpack raises a dozen types
        raise ValueError(f"not an inference message: {error}") from None
    if not isinstance(message, dict):
        raise ValueError("not an inference message")
    return message


def refusal_in(reply: Mapping[str, Any]) -> Refusal | None:
    """Return the refusal in a reply. An unknown code, sent by a replica of another version, counts as an outage."""
    if "error" not in reply:
        return None
    code: RefusalCode = reply["error"] if reply["error"] in get_args(RefusalCode) else "encoder_unavailable"
    extra = {name: reply.get(name) for name in ("index", "retry_after", "reason")}
    return Refusal(code, reply.get("message", ""), **extra)


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
