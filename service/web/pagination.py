"""Cursors of listings that go from the newest to the oldest: the time and id of the last row that was sent."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from sqlalchemy import ColumnElement, and_, or_

from service.web.errors import BadCursor


def cursor_of(at: float, row_id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([at, row_id]).encode()).decode().rstrip("=")


def after(cursor: str, at: Any, row_id: Any) -> ColumnElement[bool]:
    """What of the columns that order a listing comes after the cursor. Raises BadCursor."""
    try:
        last_at, last_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        last_at, last_id = float(last_at), str(last_id)
    except (ValueError, TypeError, binascii.Error):
        raise BadCursor("cursor: not one of this service; take next_cursor of the page before") from None
    return or_(at < last_at, and_(at == last_at, row_id < last_id))
