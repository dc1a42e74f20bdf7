"""Request and response models for a job's details."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from service.jobs.schemas import EventView
from service.web.parameters import MAX_NUMBER
from service.web.schemas import ApiModel, LabelKey, LabelValue, Priority


class HistoryView(ApiModel):
    """Part of a job's history, oldest first."""

    items: list[EventView]
    next_after: int | None
    """Number of the last event, to send as `after` for the next part; null at the end of the history."""


class LogMatch(ApiModel):
    """A log line that contains the search text."""

    line: int
    """Line number, starting at 1."""
    offset: int
    """Byte offset of the line."""
    text: str


class LogMatches(ApiModel):
    """Log lines that contain the search text, in order."""

    items: list[LogMatch]
    lines: int
    """Number of lines searched."""
    complete: bool
    """Whether the whole log was searched; false if the limit was reached first."""


class LogRange(ApiModel):
    """A range of whole lines from a log."""

    text: str
    start: int
    """Offset of the first byte."""
    end: int
    """Offset just past the last byte."""


class SampleFault(ApiModel):
    """A sample that could not be read, or that could be read only in part."""

    record: int | None
    location: str
    message: str
    damaged: bool
    """Whether part of the sample is used; false if the whole sample is skipped."""


class SampleFaults(ApiModel):
    """Unreadable and damaged samples found during a job's run."""

    items: list[SampleFault]
    bad: int
    damaged: int


class PictureView(ApiModel):
    """A stored picture."""

    name: str
    """File name: `input.webp`, `student.webp` or `rebuilt.webp`."""
    bytes: int
    """Size in bytes."""


class MediaStepView(ApiModel):
    """Pictures from a job's run after one training step. The samples and their masks are the same at every step."""

    step: int
    files: list[PictureView]


class ArtifactView(ApiModel):
    """A file that a job has written."""

    path: str
    """`run/…` for files in the job's run folder, `output/…` for the output of an embed, export or prepare job."""
    bytes: int
    """Size in bytes."""
    modified_at: datetime | None
    """Time of the last change; null if the storage does not report it."""


class ArtifactList(ApiModel):
    """Files that a job has written, in path order, without checkpoints."""

    items: list[ArtifactView]
    total: int
    """Number of files, including those beyond the first 10,000, which `items` omits."""
    bytes: int
    """Total size of all files in bytes."""


class JobChange(ApiModel):
    """Changes to a job; omitted fields are left unchanged."""

    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Display name; null removes it."""
    labels: dict[LabelKey, LabelValue] | None = Field(None, max_length=32)
    """New labels, which replace all existing labels."""
    priority: Priority | None = None
    """Priority in the queue."""


class CloneRequest(ApiModel):
    """Changes to apply to the copy of a job."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Config values to change, by dotted key."""
    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Display name. Default: the original job's name."""
    labels: dict[LabelKey, LabelValue] | None = Field(None, max_length=32)
    """Labels. Default: the original job's labels."""
    priority: Priority | None = None
    """Priority. Default: the original job's priority."""


class ForkRequest(CloneRequest):
    """Checkpoint from which the copy of a job starts, and changes to apply to the copy."""

    step: int = Field(ge=1, le=MAX_NUMBER)
    """Step of one of the job's checkpoints."""
