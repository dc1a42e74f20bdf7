"""Parse inference requests of every content type into items and options.

image/…, video/…, application/octet-stream    the body is the item; options are query parameters
multipart/form-data                           each file is an item; options are query parameters or form fields
application/json                              {"input": item or list of items, options…}; an item is
                                              {"base64": …}, {"uri": …}, a `data:` URL, or a URI
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from service.auth.isolation import LocationPolicy
from service.web.errors import UnsupportedMediaType
from service.web.request_bodies import run_by_size, run_in_thread
from service.web.schemas import ApiModel

RAW = ("image/", "video/", "application/octet-stream")
JSON, FORM = "application/json", "multipart/form-data"
MAX_ITEMS = 256
DEADLINE_S = 60.0

ENGINE_OPTIONS = {"normalize", "tokens", "layers", "top_k", "views", "mask_ratio", "seed"}

Layer = Annotated[int, Field(ge=1, le=1000)]
M = TypeVar("M", bound=ApiModel)


class Base64Input(ApiModel):
    """A base64-encoded file."""

    base64: str
    """File content, base64-encoded."""


class UriInput(ApiModel):
    """A file given by its location."""

    uri: Annotated[str, Field(max_length=2048)]
    """URI under the storage root or an allowed prefix."""


Input = Base64Input | UriInput | str


class RequestOptions(ApiModel):
    """Options that apply to each item of a request."""

    normalize: bool = False
    """Whether to scale vectors to unit length."""
    tokens: Literal["none", "patch"] = "none"
    """Tokens to return with the embedding. patch: one vector per token of the last layer."""
    layers: list[Layer] = Field(default_factory=list, max_length=64)
    """Numbers, starting at 1, of the blocks whose output tokens are returned. No norm is applied to the tokens."""
    encoding_format: Literal["float", "base64"] = "float"
    """Encoding of vectors. base64: little-endian float32, as in OpenAI's API."""
    top_k: int = Field(5, ge=1, le=1000)
    """Number of labels to return for a classification."""
    views: Annotated[str, Field(pattern=r"^[1-9][0-9]?x[1-9][0-9]?$")] | None = None
    """Views of a file, as segments x crops (such as 5x3), whose results are averaged. Default: one center clip."""
    mask_ratio: float | None = Field(None, ge=0, lt=1)
    """Fraction of tokens that a reconstruction hides. Default: the ratio that the encoder was trained with."""
    seed: int = Field(0, ge=0, lt=2**53)
    """Seed for a reconstruction's mask; the same seed and ratio hide the same tokens."""
    deadline_s: float = Field(DEADLINE_S, gt=0, le=600)
    """Time limit in seconds, after which the request fails."""

    def for_engine(self, task: str) -> dict[str, Any]:
        """Return the options that the replica's engine needs."""
        return self.model_dump(include=ENGINE_OPTIONS) | {"task": task}


class EncodeRequest(RequestOptions):
    """JSON body of an inference request."""

    input: Input | Annotated[list[Input], Field(min_length=1, max_length=MAX_ITEMS)]
    """File or list of files."""


class InferenceRequest(NamedTuple):
    """A parsed request."""

    items: list[dict[str, Any]]
    """Items, each {"content": bytes} or {"uri": text}."""
    options: RequestOptions
    single: bool
    """Whether the response is one object rather than a list."""


async def read_request(request: Request, policy: LocationPolicy, project: str | None) -> InferenceRequest:
    """Parse a request by its Content-Type. `project` is the caller's, or None for all projects.

    Raises RequestValidationError, UnsupportedMediaType, UriNotAllowed or NotFound.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    query: dict[str, Any] = dict(request.query_params)
    if "layers" in query:
        query["layers"] = request.query_params.getlist("layers")
    if media == JSON:
        body = await request.body()
        parsed = await run_by_size(len(body), parse_model, EncodeRequest, body)
        items = await parse_inputs(parsed.input, policy, project)
        return InferenceRequest(items, parsed, single=not isinstance(parsed.input, list))
    if media == FORM:
        return await _parse_form(request, query)
    if media.startswith(RAW):
        content = await request.body()
        if not content:
            raise field_error("body", "is empty; send the file's bytes")
        return InferenceRequest([{"content": content}], parse_model(RequestOptions, query), single=True)
    raise UnsupportedMediaType(
        f"Content-Type: {media or 'none'}; send image/…, video/…, application/octet-stream, {FORM} or {JSON}"
    )


async def parse_inputs(
    inputs: Input | list[Input], policy: LocationPolicy, project: str | None
) -> list[dict[str, Any]]:
    """Convert the field `input` to items. Raises RequestValidationError, UriNotAllowed or NotFound."""
    values = inputs if isinstance(inputs, list) else [inputs]
    size = sum(map(input_size, values))
    if any(map(_is_location, values)):  # looking up its owner blocks
        return await run_in_thread(size, _parse_inputs, inputs, policy, project)
    return await run_by_size(size, _parse_inputs, inputs, policy, project)


def _is_location(value: Input) -> bool:
    text = value.uri if isinstance(value, UriInput) else value if isinstance(value, str) else "data:"
    return not text.startswith("data:")


def input_size(value: Input) -> int:
    return len(value if isinstance(value, str) else value.base64 if isinstance(value, Base64Input) else value.uri)


def _parse_inputs(inputs: Input | list[Input], policy: LocationPolicy, project: str | None) -> list[dict[str, Any]]:
    values = inputs if isinstance(inputs, list) else [inputs]
    return [parse_input(value, f"input.{number}", policy, project) for number, value in enumerate(values)]


def parse_input(value: Input, field: str, policy: LocationPolicy, project: str | None) -> dict[str, Any]:
    """Convert an input to an item. Raises RequestValidationError, UriNotAllowed or NotFound.

    Call it in a thread, because the policy may query the database.
    """
    if isinstance(value, Base64Input):
        return {"content": _decode_base64(value.base64, field)}
    text = value.uri if isinstance(value, UriInput) else value
    if text.startswith("data:"):
        head, comma, data = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise field_error(field, "must be a base64 data URL, such as data:image/png;base64,…")
        return {"content": _decode_base64(data, field)}
    if "/" not in text:
        raise field_error(field, "must be base64, a data: URL, or the URI of a file")
    policy.check(field, text, project)
    return {"uri": text}


def _decode_base64(text: str, field: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise field_error(field, "is not base64") from None
    if not content:
        raise field_error(field, "is empty")
    return content


async def _parse_form(request: Request, query: dict[str, Any]) -> InferenceRequest:
    items = list[dict[str, Any]]()
    async with request.form(max_files=MAX_ITEMS, max_fields=64) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                items.append({"content": await value.read()})
            elif name == "layers":
                query.setdefault(name, []).append(value)
            else:
                query[name] = value
    if not items:
        raise field_error("body", "has no file; send at least one part with a filename")
    if not all(item["content"] for item in items):
        raise field_error("body", "has an empty file; send the file's bytes")
    return InferenceRequest(items, parse_model(RequestOptions, query), single=len(items) == 1)


def parse_model(model: type[M], content: bytes | dict[str, Any]) -> M:
    """Validate JSON or parsed values against a body schema. Raises RequestValidationError."""
    try:
        return model.model_validate_json(content) if isinstance(content, bytes) else model.model_validate(content)
    except ValidationError as error:
        parsed = json.loads(error.json(include_url=False, include_context=False, include_input=False))
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in parsed]) from None


def field_error(field: str, message: str) -> RequestValidationError:
    """Return the error for one field of the body, or for the whole body if `field` is `body`."""
    location = ("body",) if field == "body" else ("body", *field.split("."))
    return RequestValidationError([{"type": "value_error", "loc": location, "msg": message}])
