"""What an encoder found, in the form that was asked for: JSON, NumPy, Arrow, or a picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.serving.gateway import Reply
from service.serving.protocol import PNG
from service.serving.requests import Asked

NUMPY = "application/x-npy"
ENCODER = "X-Encoder"  # the id of the encoder that answered, in every form


def wanted_form(accept: str | None, offered: Sequence[str]) -> str | None:
    """The first that is offered and that the caller asks for; none: JSON."""
    forms = {part.partition(";")[0].strip() for part in (accept or "").split(",")}
    return next((form for form in offered if form in forms), None)


def rendered(reply: Reply, asked: Asked, form: str | None) -> Response:
    """One item: {encoder, embedding, …}; several: {encoder, data: [{index, embedding, …}]}."""
    headers = {ENCODER: reply.encoder}
    if reply.content is not None:
        return Response(reply.content, media_type=form, headers=headers)
    if form == NUMPY:
        out = io.BytesIO()
        np.save(out, np.stack([item["embedding"] for item in reply.items]), allow_pickle=False)
        return Response(out.getvalue(), media_type=NUMPY, headers=headers)
    items = [_plain(item, asked.options.encoding_format) for item in reply.items]
    if asked.single:
        return JSONResponse({"encoder": reply.encoder, **items[0]}, headers=headers)
    data = [{"index": index, **item} for index, item in enumerate(items)]
    return JSONResponse({"encoder": reply.encoder, "data": data}, headers=headers)


def _plain(value: Any, encoding: str) -> Any:
    if isinstance(value, np.ndarray):
        return in_base64(value) if encoding == "base64" else value.tolist()
    if isinstance(value, bytes):  # a picture
        return f"data:{PNG};base64,{base64.b64encode(value).decode()}"
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, encoding) for key, inner in value.items()}
    return value


def in_base64(vector: np.ndarray[Any, Any]) -> str:
    """Little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
