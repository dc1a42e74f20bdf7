"""Render replies as JSON, NumPy, Arrow or PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.serving.gateway import EncoderReply
from service.serving.protocol import ARROW, PNG
from service.serving.requests import InferenceRequest, RequestOptions
from service.web.errors import Refusal

NUMPY = "application/x-npy"
ENCODER = "X-Encoder"  # response header with the encoder id, set for every media type


def negotiate_media_type(accept: str | None, offered: Sequence[str]) -> str | None:
    """Return the first offered media type that the Accept header contains, or None for JSON."""
    accepted = {part.partition(";")[0].strip() for part in (accept or "").split(",")}
    return next((media_type for media_type in offered if media_type in accepted), None)


def render_reply(reply: EncoderReply, request: InferenceRequest, media_type: str | None) -> Response:
    """Render a reply: {encoder, embedding, …} for one item, {encoder, data: [{index, embedding, …}]} for several."""
    headers = {ENCODER: reply.encoder}
    if reply.content is not None:
        return Response(reply.content, media_type=media_type, headers=headers)
    if media_type == NUMPY:
        out = io.BytesIO()
        np.save(out, _to_array(reply.items, request.options), allow_pickle=False)
        return Response(out.getvalue(), media_type=NUMPY, headers=headers)
    items = [_to_json(item, request.options.encoding_format) for item in reply.items]
    if request.single:
        return JSONResponse({"encoder": reply.encoder, **items[0]}, headers=headers)
    data = [{"index": index, **item} for index, item in enumerate(items)]
    return JSONResponse({"encoder": reply.encoder, "data": data}, headers=headers)


def check_array(options: RequestOptions) -> None:
    """Raise Refusal if the results do not fit into the single array of a `.npy` file."""
    if options.tokens != "none" and options.layers:
        message = f"Accept: {NUMPY} holds one array; request either tokens or layers, or Accept: {ARROW} for both"
        raise Refusal("not_possible", message)


def _to_array(items: Sequence[Mapping[str, Any]], options: RequestOptions) -> Any:
    """Stack the requested output of each item: tokens (N, D), layers (L, N, D), or otherwise the embedding (D,)."""
    if options.tokens != "none":
        return np.stack([item["tokens"] for item in items])
    if options.layers:
        return np.stack([[item["layers"][str(number)] for number in options.layers] for item in items])
    return np.stack([item["embedding"] for item in items])


def _to_json(value: Any, encoding: str) -> Any:
    if isinstance(value, np.ndarray):
        return to_base64(value) if encoding == "base64" else value.tolist()
    if isinstance(value, bytes):  # PNG
        return f"data:{PNG};base64,{base64.b64encode(value).decode()}"
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner, encoding) for key, inner in value.items()}
    return value


def to_base64(vector: np.ndarray[Any, Any]) -> str:
    """Encode a vector as little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
