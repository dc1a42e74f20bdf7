"""ASGI middleware for the access log, body limits and media types; request IDs and response ETags.

Does not import routes or authentication.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.web.error_handlers import error_response
from service.web.errors import BodyTooLarge, UnsupportedMediaType

M = TypeVar("M", bound=BaseModel)
logger = logging.getLogger("service.access")

_PLAIN_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")


def plain_request_id(given: str) -> str:
    """Return a caller's request ID if it is well-formed, and a new one otherwise."""
    return given if _PLAIN_ID.fullmatch(given) else uuid.uuid4().hex


class AccessLogMiddleware:
    """Logs every request with its status and duration."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            took = (time.monotonic() - began) * 1000
            logger.info("%s %s %d %.1f ms", scope["method"], scope["path"], status, took)


class BodyLimitMiddleware:
    """Rejects bodies that are too large or not JSON, before a route reads them.

    Paths that accept files have a larger limit and check media types themselves.
    """

    def __init__(self, app: ASGIApp, limit: int, files: re.Pattern[str], files_limit: int) -> None:
        """`files` is a pattern for the paths that accept files. Limits are in bytes."""
        self.app, self._limit, self._files, self._files_limit = app, limit, files, files_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        has_body = (length.isdigit() and int(length) > 0) or b"transfer-encoding" in headers
        accepts_files = self._files.fullmatch(scope["path"]) is not None
        limit = self._files_limit if accepts_files else self._limit
        if length.isdigit() and int(length) > limit:
            await self._reject(_too_large(limit), scope, receive, send)
            return
        media = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if has_body and media != b"application/json" and not accepts_files:
            detail = f"Content-Type: {media.decode('latin-1') or 'none'}; send application/json"
            await self._reject(UnsupportedMediaType(detail), scope, receive, send)
            return
        if not has_body:
            await self.app(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > limit:
                await self._reject(_too_large(limit), scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        buffered: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return buffered.pop() if buffered else await receive()

        await self.app(scope, replay, send)

    async def _reject(self, error: Any, scope: Scope, receive: Receive, send: Send) -> None:
        await error_response(error)(scope, receive, send)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes; store large data on the storage root and pass its URI")


def tagged(view: M, response: Response, if_none_match: str | None) -> M:
    """Return the view and set its ETag, or return a 304 response if the caller already has this version."""
    tag = f'W/"{hashlib.sha256(view.model_dump_json().encode()).hexdigest()[:32]}"'
    if is_known(tag, if_none_match):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": tag})  # type: ignore[return-value]  # FastAPI sends it as is
    response.headers["ETag"] = tag
    return view


def is_known(tag: str, if_none_match: str | None) -> bool:
    return if_none_match is not None and tag in (part.strip() for part in if_none_match.split(","))
