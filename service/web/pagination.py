"""Cursors for listings ordered from newest to oldest. A cursor encodes the time and ID of a page's last row."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from sqlalchemy import ColumnElement, and_, or_

from service.web.errors import BadCursor


def cursor_of(at: float, row_id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([at, row_id]).encode()).decode().rstrip("=")


def position_of(cursor: str) -> tuple[float, str]:
    """Return the time and ID that a cursor encodes. Raises BadCursor if the cursor is invalid."""
    try:
        at, row_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return float(at), str(row_id)
    except (ValueError, TypeError, binascii.Error):
        raise bad_cursor() from None


def bad_cursor() -> BadCursor:
    return BadCursor("cursor: not issued by this service; use `next_cursor` from the previous page")


def after(cursor: str, at: Any, row_id: Any) -> ColumnElement[bool]:
    """Return the condition for rows after a cursor, given the columns that order the listing.

    Raises BadCursor if the cursor is invalid.
    """
    last_at, last_id = position_of(cursor)
    return or_(at < last_at, and_(at == last_at, row_id < last_id))
