"""Request and response models for a job's details."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from service.jobs.schemas import EventView
from service.web.schemas import ApiModel, LabelKey, LabelValue, Priority


class HistoryView(ApiModel):
    """A part of a job's history, oldest first."""

    items: list[EventView]
    next_after: int | None
    """Number of the last event, to be sent as `after` for the next part; null if the history ends here."""


class LogMatch(ApiModel):
    """A line of a log that contains the searched text."""

    line: int
    """Number of the line, starting at 1."""
    offset: int
    """Offset of the line in bytes."""
    text: str


class LogMatches(ApiModel):
    """Lines of a log that contain the searched text, in order."""

    items: list[LogMatch]
    lines: int
    """Number of lines searched."""
    complete: bool
    """Whether the whole log was searched; false if the limit was reached before."""


class LogRange(ApiModel):
    """A range of a log in whole lines."""

    text: str
    start: int
    """Offset of the first byte."""
    end: int
    """Offset after the last byte."""


class SampleFault(ApiModel):
    """A sample that could not be read, or could only be read in part."""

    record: int | None
    location: str
    message: str
    damaged: bool
    """Whether a part of the sample is used; false if it is skipped."""


class SampleFaults(ApiModel):
    """Bad and damaged samples of a job's run."""

    items: list[SampleFault]
    bad: int
    damaged: int


class JobChange(ApiModel):
    """Changes to a job; omitted fields stay as they are."""

    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Display name; null removes it."""
    labels: dict[LabelKey, LabelValue] | None = Field(None, max_length=32)
    """Labels, which replace the previous ones."""
    priority: Priority | None = None
    """Priority in the queue."""


class CloneRequest(ApiModel):
    """Changes for the copy of a job."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Config values to change, by dotted key."""
    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Display name. Default: that of the original."""
    labels: dict[LabelKey, LabelValue] | None = Field(None, max_length=32)
    """Labels. Default: those of the original."""
    priority: Priority | None = None
    """Priority. Default: that of the original."""
