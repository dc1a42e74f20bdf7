"""ASGI middleware for the access log, and helpers for request IDs and response ETags.

Does not import routes or authentication.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import uuid
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import quote

import anyio
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import log_context
from service.web.errors import CLIENT_CLOSED_REQUEST
from service.web.request_bodies import has_body

M = TypeVar("M", bound=BaseModel)
logger = logging.getLogger("service.access")

MAX_LOGGED_PATH = 1000

_DISCONNECT_ERRORS = (ClientDisconnect, asyncio.CancelledError, anyio.BrokenResourceError, anyio.ClosedResourceError)
_PATH = "/:@!$&'()*+,;=~"  # characters of a path that are not quoted
_PLAIN_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")


def plain_request_id(given: str) -> str:
    """Return the caller's request ID if it is well-formed; otherwise return a new ID."""
    return given if _PLAIN_ID.fullmatch(given) else uuid.uuid4().hex


class AccessLogMiddleware:
    """Logs every request on one line with its status (499 if the caller disconnected first) and duration."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        caller = _CallerConnection(receive, has_body(Headers(scope=scope)))

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = CLIENT_CLOSED_REQUEST if await caller.has_left() else message["status"]
            await send(message)

        with log_context() as fields:
            try:
                await self.app(scope, caller.receive, send_and_note_status)
                status = status or CLIENT_CLOSED_REQUEST
            except _DISCONNECT_ERRORS:
                if _is_cancelled() or not await caller.has_left():
                    raise
                status = status or CLIENT_CLOSED_REQUEST
            finally:
                fields.setdefault("job", scope.get("path_params", {}).get("job_id"))
                took = (time.monotonic() - began) * 1000
                # Quoted here, since a handler other than ours would not escape a line break.
                path = quote(scope["path"], _PATH, errors="replace")[:MAX_LOGGED_PATH]
                status = status or HTTPStatus.INTERNAL_SERVER_ERROR
                logger.info("%s %s %d %.1f ms", scope["method"], path, status, took)


class _CallerConnection:
    """Forwards the caller's messages and detects when it disconnects."""

    def __init__(self, receive: Receive, has_body: bool) -> None:
        self._receive, self._unread, self._left = receive, has_body, False
        self._early: list[Message] = []  # received by `has_left`

    async def receive(self) -> Message:
        return self._early.pop(0) if self._early else await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._left |= message["type"] == "http.disconnect"
        self._unread &= message.get("more_body", False)
        return message

    async def has_left(self) -> bool:
        """Whether the caller has disconnected. Does not wait; returns False until the body has been read."""
        while not self._unread and not self._left:
            with anyio.CancelScope() as scope:
                scope.cancel()  # ends the call unless a message is available
                self._early.append(await self._next())
            if scope.cancelled_caught:
                break
        return self._left


def _is_cancelled() -> bool:
    """Whether this task is being cancelled, as on shutdown."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def tagged(view: M, response: Response, if_none_match: str | None) -> M:
    """Return the view and set its ETag, or return a 304 response if the caller already has this version."""
    tag = f'W/"{hashlib.sha256(view.model_dump_json().encode()).hexdigest()[:32]}"'
    if is_known(tag, if_none_match):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": tag})  # type: ignore[return-value]  # FastAPI sends it as is
    response.headers["ETag"] = tag
    return view


def is_known(tag: str, if_none_match: str | None) -> bool:
    return if_none_match is not None and tag in (part.strip() for part in if_none_match.split(","))
