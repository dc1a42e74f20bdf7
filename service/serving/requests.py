"""What a caller sends to an encoder, in any of its forms, to one: items and what is wanted of them.

    image/…, video/…, application/octet-stream    the body is the item; options stand in the query
    multipart/form-data                           each file is an item; options in the query or as fields
    application/json                              {"input": item or list of items, options…}; an item is
                                                  {"base64": …}, {"uri": …}, a `data:` URL, or a URI

Knows nothing of replicas.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from service.auth.uri_policy import UriPolicy
from service.jobs.schemas import Wire
from service.web.errors import UnsupportedMediaType

RAW = ("image/", "video/", "application/octet-stream")
JSON, FORM = "application/json", "multipart/form-data"
MOST_ITEMS = 256
DEADLINE_S = 60.0

WANTED = {"normalize", "tokens", "layers", "top_k", "views", "mask_ratio", "seed"}

Layer = Annotated[int, Field(ge=1, le=1000)]


class Encoded(Wire):
    base64: str
    """The file's bytes."""


class Located(Wire):
    uri: Annotated[str, Field(max_length=2048)]
    """Below the storage root or an allowed prefix."""


Input = Encoded | Located | str


class Options(Wire):
    """What is wanted of each item."""

    normalize: bool = False
    """Vectors of length 1."""
    tokens: Literal["none", "patch"] = "none"
    """patch: beside the vector, one for each token of the last layer."""
    layers: list[Layer] = Field(default_factory=list, max_length=64)
    """Tokens of these blocks, counted from 1, before any norm."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: little-endian float32, as OpenAI's API has it."""
    top_k: int = Field(5, ge=1, le=1000)
    """Of a classification: how many labels."""
    views: Annotated[str, Field(pattern=r"^[1-9][0-9]?x[1-9][0-9]?$")] | None = None
    """Segments x crops, such as 5x3, whose scores are averaged; none: one clip of the middle."""
    mask_ratio: float | None = Field(None, ge=0, lt=1)
    """Of a reconstruction: fraction of tokens that is hidden; none: as the encoder was trained."""
    seed: int = Field(0, ge=0, lt=2**53)
    """Of a reconstruction: which tokens; the same for the same seed and ratio."""
    deadline_s: float = Field(DEADLINE_S, gt=0, le=600)

    def want(self, task: str) -> dict[str, Any]:
        """What of them is the replica's matter."""
        return self.model_dump(include=WANTED) | {"task": task}


class EncodeRequest(Options):
    """A request as JSON."""

    input: Input | Annotated[list[Input], Field(min_length=1, max_length=MOST_ITEMS)]


class Asked(NamedTuple):
    items: list[dict[str, Any]]
    """{"content": bytes} or {"uri": text}."""
    options: Options
    single: bool
    """Whether the answer is one object rather than a list."""


async def read_request(request: Request, policy: UriPolicy) -> Asked:
    """Raises RequestValidationError, UnsupportedMediaType, UriNotAllowed."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    query: dict[str, Any] = dict(request.query_params)
    if "layers" in query:
        query["layers"] = request.query_params.getlist("layers")
    if media == JSON:
        return _of_json(await request.body(), policy)
    if media == FORM:
        return await _of_form(request, query)
    if media.startswith(RAW):
        content = await request.body()
        if not content:
            raise _invalid("body", "is empty; send the file's bytes")
        return Asked([{"content": content}], _options(query), single=True)
    raise UnsupportedMediaType(
        f"Content-Type: {media or 'none'}; send image/…, video/…, application/octet-stream, {FORM} or {JSON}"
    )


def _of_json(body: bytes, policy: UriPolicy) -> Asked:
    try:
        found = EncodeRequest.model_validate_json(body)
    except ValidationError as error:
        raise _located(error) from None
    inputs = found.input if isinstance(found.input, list) else [found.input]
    items = [item_of(value, f"input.{number}", policy) for number, value in enumerate(inputs)]
    return Asked(items, found, single=not isinstance(found.input, list))


def item_of(value: Input, field: str, policy: UriPolicy) -> dict[str, Any]:
    """Raises RequestValidationError, UriNotAllowed."""
    if isinstance(value, Encoded):
        return {"content": _decoded(value.base64, field)}
    text = value.uri if isinstance(value, Located) else value
    if text.startswith("data:"):
        head, comma, data = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise _invalid(field, "is not a data URL in base64: data:image/png;base64,…")
        return {"content": _decoded(data, field)}
    if "/" not in text:
        raise _invalid(field, "give base64, a data: URL, or the URI of a file")
    policy.check(field, text)
    return {"uri": text}


def _decoded(text: str, field: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _invalid(field, "is not base64") from None
    if not content:
        raise _invalid(field, "is empty")
    return content


async def _of_form(request: Request, query: dict[str, Any]) -> Asked:
    items = list[dict[str, Any]]()
    async with request.form(max_files=MOST_ITEMS, max_fields=64) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                items.append({"content": await value.read()})
            elif name == "layers":
                query.setdefault(name, []).append(value)
            else:
                query[name] = value
    if not items:
        raise _invalid("body", "holds no file; send at least one part with a filename")
    if not all(item["content"] for item in items):
        raise _invalid("body", "holds an empty file")
    return Asked(items, _options(query), single=len(items) == 1)


def _options(values: dict[str, Any]) -> Options:
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        raise _located(error) from None


def _located(error: ValidationError) -> RequestValidationError:
    found = json.loads(error.json(include_url=False, include_context=False, include_input=False))
    return RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found])


def _invalid(field: str, message: str) -> RequestValidationError:
    location = ("body",) if field == "body" else ("body", *field.split("."))
    return RequestValidationError([{"type": "value_error", "loc": location, "msg": message}])
