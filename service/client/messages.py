"""Build request paths and bodies for the client methods, and parse responses."""

from __future__ import annotations

import base64
import functools
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter

T = TypeVar("T")

ANY: Any = object()
"""Default of `aliases.move(expected=…)`: no condition on the current target."""

_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def api_path(*parts: str) -> str:
    """Return the path of a resource, with each segment escaped."""
    return "/".join(["/v1", *(quote(part, safe="") for part in parts)])


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def fields_of(request: BaseModel) -> dict[str, Any]:
    """Return the fields that the caller has set, as JSON."""
    return request.model_dump(mode="json", exclude_unset=True)


def idempotency(key: str | None) -> dict[str, str]:
    """Return the header that makes a POST safe to retry. The default is a new random key."""
    return {"Idempotency-Key": key or str(uuid.uuid4())}


def parse(kind: type[T], content: str | bytes) -> T:
    """Parse JSON, ignoring fields added by newer services."""
    parsed: T = _adapter(kind).validate_json(content, extra="ignore")
    return parsed


def input_item(file: str | Path | bytes) -> dict[str, str]:
    """Convert a local path, bytes or a URI to a request input."""
    if isinstance(file, str) and "://" in file:
        return {"uri": file}
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    return {"base64": base64.b64encode(content).decode()}


def input_items(files: Iterable[str | Path | bytes]) -> list[dict[str, str]]:
    return [input_item(file) for file in files]
