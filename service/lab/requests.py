"""Parse requests to the mask lab: a file as the body or in a form, JSON, or only query parameters without an input."""

from __future__ import annotations

from typing import Any, NamedTuple

from starlette.datastructures import UploadFile
from starlette.requests import Request

from service.auth.isolation import LocationPolicy
from service.lab.schemas import LabOptions, LabRequest
from service.serving.requests import FORM, JSON, RAW, field_error, parse_inputs, parse_model
from service.web.errors import UnsupportedMediaType
from service.web.request_bodies import has_body, run_by_size


class LabInput(NamedTuple):
    """A parsed request."""

    options: LabOptions
    item: dict[str, Any] | None
    """{"content": bytes} or {"uri": text}; None without an input."""


async def read_lab_request(request: Request, policy: LocationPolicy, project: str | None) -> LabInput:
    """Parse a request by its Content-Type; options are query parameters, form fields or members of the JSON body.

    Raises RequestValidationError, UnsupportedMediaType, UriNotAllowed or NotFound.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    query: dict[str, Any] = dict(request.query_params)
    if not has_body(request.headers):
        return LabInput(parse_model(LabOptions, query), None)
    if media == JSON:
        body = await request.body()
        parsed = await run_by_size(len(body), parse_model, LabRequest, body)
        items = await parse_inputs(parsed.input, policy, project) if parsed.input is not None else [None]
        return LabInput(parsed, items[0])
    if media == FORM:
        return await _parse_form(request, query)
    if media.startswith(RAW):
        return LabInput(parse_model(LabOptions, query), {"content": await request.body()})
    raise UnsupportedMediaType(
        f"Content-Type: {media or 'none'}; send image/…, video/…, application/octet-stream, {FORM} or {JSON}"
    )


async def _parse_form(request: Request, query: dict[str, Any]) -> LabInput:
    item: dict[str, Any] | None = None
    async with request.form(max_files=1, max_fields=64) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                query[name] = value
            elif value.size:
                item = {"content": await value.read()}
    if item is None:
        raise field_error("body", "has no file; send one part with a filename, or no body at all")
    return LabInput(parse_model(LabOptions, query), item)
