"""Inference responses: the media types that the client accepts, and their conversion to views.

Embeddings are transferred in binary form: as Arrow if they include tokens or layers, otherwise as NumPy. JSON is also
parsed, for `encoding_format="base64"` and for services that offer nothing else. NumPy and pyarrow are imported on first
use, because most calls need neither.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from service.serving.schemas import EmbeddingView

V = TypeVar("V", bound=BaseModel)

JSON = "application/json"


def accepted_media_types(options: Mapping[str, Any]) -> str:
    """Return the Accept header for an embeddings request with these options."""
    from service.serving.protocol import ARROW
    from service.serving.responses import NUMPY

    if options.get("encoding_format", "float") != "float":
        return JSON
    if options.get("tokens", "none") == "none" and not options.get("layers"):
        return f"{NUMPY}, {JSON}"
    return f"{ARROW}, {JSON}" if find_spec("pyarrow") else JSON  # the control plane's image has no pyarrow


def parse_embeddings(response: httpx.Response) -> list[EmbeddingView]:
    """Parse an embeddings response in any of the accepted media types."""
    from service.serving.protocol import ARROW
    from service.serving.responses import ENCODER, NUMPY

    media_type = response.headers.get("Content-Type", "").partition(";")[0]
    if media_type == NUMPY:
        import numpy as np

        vectors = np.load(io.BytesIO(response.content), allow_pickle=False)
        return _views(EmbeddingView, response.headers[ENCODER], ({"embedding": vector.tolist()} for vector in vectors))
    if media_type == ARROW:
        import pyarrow as pa

        rows = pa.ipc.open_stream(response.content).read_all().to_pylist()
        return _views(EmbeddingView, response.headers[ENCODER], rows)
    return parse_items(EmbeddingView, response)


def parse_items(kind: type[V], response: httpx.Response) -> list[V]:
    """Parse a JSON response with one view for each file."""
    body = json.loads(response.content)
    return _views(kind, body["encoder"], body["data"])


def _views(kind: type[V], encoder: str, items: Iterable[Mapping[str, Any]]) -> list[V]:
    """Convert each item to a view, ignoring fields added by newer services."""
    fields = ({"encoder": encoder, "index": index, **item} for index, item in enumerate(items))
    return [kind.model_validate(item, extra="ignore") for item in fields]
