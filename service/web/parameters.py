"""Request parameters shared by several packages, as annotated types with descriptions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, Query
from pydantic import AwareDatetime, BeforeValidator

MAX_NUMBER = 10**15  # of offsets and event numbers: exact in JSON, and fits the integers of the databases

CURSOR = "`next_cursor` of the previous page. Default: the first page."
"""Description of a cursor, whose maximum length differs between listings."""


def _not_a_number(value: object) -> object:
    """Reject numbers, which pydantic would read as seconds or milliseconds, depending on their size."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return value
    raise ValueError("must be a date and time with a time zone, such as 2026-01-31T12:00:00Z")


Timestamp = Annotated[AwareDatetime, BeforeValidator(_not_a_number)]
PageSize = Annotated[int, Query(ge=1, le=200, description="Maximum number of items to return.")]
ProjectFilter = Annotated[
    str | None,
    Query(
        max_length=63,
        description="Project to list; only for keys that cover all projects. Default: all visible projects.",
    ),
]
IfNoneMatch = Annotated[
    str | None, Header(description="ETag of an earlier response. If it is still current, the status is 304.")
]
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "Not modified: the ETag matches `If-None-Match`."}
}
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="Key that makes the request safe to retry: requests with the same key return the same job.",
    ),
]
LastEventId = Annotated[
    int,
    Header(
        ge=0,
        le=MAX_NUMBER,
        description="ID of the last event received, after which the stream resumes; 0 to start from the beginning.",
    ),
]
