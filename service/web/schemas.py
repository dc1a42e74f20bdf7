"""Types shared by the request and response models in all packages."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(max_length=255)]


def not_a_boolean(value: object) -> object:
    """Reject true and false, which pydantic would read as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Priority = Annotated[int, Field(ge=-100, le=100), BeforeValidator(not_a_boolean)]
Project = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]

DEFAULT_PROJECT = "default"
"""Project for new objects if the caller's key covers all projects and the request specifies none."""


class ApiModel(BaseModel):
    """Base class for all request and response models. Instances are immutable, and unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def utc_datetime(seconds: float) -> datetime:
    """Convert a stored time, in seconds since the epoch, to the UTC datetime used in responses."""
    return datetime.fromtimestamp(seconds, UTC)


def utc_datetime_or_none(seconds: float | None) -> datetime | None:
    """Convert a stored time with `utc_datetime`, or return None if it is None."""
    return None if seconds is None else utc_datetime(seconds)
