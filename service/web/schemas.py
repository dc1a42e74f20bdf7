"""Types shared by the request and response models of every package. Independent of what they describe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(max_length=255)]
Project = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]

DEFAULT_PROJECT = "default"
"""Project of what a caller with access to all projects creates without naming one."""


class ApiModel(BaseModel):
    """Base of all request and response models: immutable, rejects unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
