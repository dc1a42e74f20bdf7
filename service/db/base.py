"""Base class of the database tables."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Double
from sqlalchemy.orm import DeclarativeBase


class Base(DeclarativeBase):
    type_annotation_map = {float: Double, dict[str, Any]: JSON, dict[str, str]: JSON, list[str]: JSON}  # noqa: RUF012
