"""Limits on request bodies: ASGI middleware, a memory budget for all bodies, and JSON parsing in a thread.

Does not import routes or authentication. The caller is checked before a body is read, in `service.auth.middleware`.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.web.error_handlers import error_response
from service.web.errors import BodyTimeout, BodyTooLarge, Refusal, ServiceError, UnsupportedMediaType

T = TypeVar("T")

INLINE_BYTES = 256 * 2**10
"""Size up to which bodies are parsed and responses rendered on the event loop; more would delay other requests."""
MAX_JSON_VALUES = 100_000
"""Maximum number of values in a JSON body. Validation may report each one, at a hundred times the body's size."""
FORM = "application/x-www-form-urlencoded"
STALL_S = 30.0  # longest pause while a body is received
LINGER_BYTES, LINGER_S = 2**18, 1.0  # how much of a rejected body is discarded, and for how long

_large = anyio.CapacityLimiter(4)  # threads for large bodies, apart from those that run handlers


async def run_by_size(size: int, function: Callable[..., T], *args: Any) -> T:
    """Call a function that processes `size` bytes; if `size` is large, call it in a thread."""
    return function(*args) if size <= INLINE_BYTES else await run_in_thread(size, function, *args)


async def run_in_thread(size: int, function: Callable[..., T], *args: Any) -> T:
    """Call a function that processes `size` bytes in a thread; the number of threads for large bodies is limited."""
    return await anyio.to_thread.run_sync(function, *args, limiter=_large if size > INLINE_BYTES else None)


def has_body(headers: Headers) -> bool:
    """Whether a request has a body, according to its headers."""
    return headers.get("content-length", "0").strip("0") != "" or "transfer-encoding" in headers


async def reject_unread(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to a request without reading its body. If the request has a body, close the connection afterwards.

    Part of the body is read and discarded first: closing a connection with unread data resets it, and a client that is
    still sending may then lose the response.
    """
    response = error_response(Request(scope), error)
    if not has_body(Headers(scope=scope)):
        await response(scope, receive, send)
        return
    response.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with anyio.move_on_after(LINGER_S):
        discarded = 0
        while discarded < LINGER_BYTES:
            message = await receive()
            discarded += len(message.get("body", b""))
            if not message.get("more_body", False):
                break
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def reserve_reply(request: HTTPConnection, size: int) -> None:
    """Count a reply's bytes against the body budget until the request ends, as replies to slow callers stay in memory.

    Raises Refusal if too few bytes are left. No-op outside BodyLimitMiddleware and for requests without a body.
    """
    body: _BodyReader | None = request.scope.get("state", {}).get("body")
    if body is not None:
        body.reserve_reply(size)


class BodyBudget:
    """Memory budget for the request bodies and encoder replies in a process. Used on the event loop only."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes."""
        self.limit, self.used = limit, 0

    def reserve(self, size: int) -> None:
        """Reserve bytes until `release` is called. Raises Refusal if too few are left."""
        if self.used + size > self.limit:
            message = f"other requests and their replies use {self.used} of {self.limit} bytes; try again in a second"
            raise Refusal("overloaded", message, retry_after=1.0)
        self.used += size

    def release(self, size: int) -> None:
        self.used -= size


class BodyLimitMiddleware:
    """Rejects bodies that are too large, are not JSON or exceed the memory budget, before a route reads them.

    Paths that accept files have a larger limit and check media types themselves.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        files: re.Pattern[str],
        files_limit: int,
        budget: BodyBudget,
        forms: re.Pattern[str] | None = None,
    ) -> None:
        """`files` and `forms` are patterns for the paths that accept files and HTML forms. Limits are in bytes."""
        self.app, self._limit, self._files, self._files_limit = app, limit, files, files_limit
        self._budget, self._forms = budget, forms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if not has_body(headers):
            await self.app(scope, receive, send)
            return
        accepts_files = self._files.fullmatch(scope["path"]) is not None
        body = _BodyReader(self._files_limit if accepts_files else self._limit, headers, self._budget)
        try:
            try:
                accepts_forms = self._forms is not None and self._forms.fullmatch(scope["path"]) is not None
                body.check_headers(accepts_files, accepts_forms)
                parts = await body.read(receive)
                scope.setdefault("state", {})["body"] = body
            except ServiceError as error:
                await reject_unread(error, scope, receive, send)
                return
            if not parts:  # the caller is gone
                return

            async def replay() -> Message:
                if not parts:
                    return await receive()
                await anyio.lowlevel.checkpoint()  # lets other requests run between parts
                return {"type": "http.request", "body": parts.popleft(), "more_body": bool(parts)}

            await self.app(scope, replay, send)
        finally:
            body.release()


class _BodyReader:
    """Reads one body, enforces its limits and reserves its bytes in the budget."""

    def __init__(self, limit: int, headers: Headers, budget: BodyBudget) -> None:
        self._limit, self._budget, self._reserved = limit, budget, 0
        length = headers.get("content-length", "")
        self._length = int(length) if length.isdecimal() else 0
        self._media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        self._is_json = self._media_type == "application/json"

    def check_headers(self, accepts_files: bool, accepts_forms: bool = False) -> None:
        """Raise a ServiceError if the headers suffice to reject the body; otherwise reserve its Content-Length."""
        if self._length > self._limit:
            raise _too_large(self._limit)
        is_form = accepts_forms and self._media_type == FORM
        if not (self._is_json or accepts_files or is_form):
            raise UnsupportedMediaType(f"Content-Type: {self._media_type or 'none'}; send application/json")
        self._reserve(self._length)

    async def read(self, receive: Receive) -> deque[bytes]:
        """Return the body in chunks of at least INLINE_BYTES, except for the last chunk.

        Returns no chunks if the caller disconnects.
        Raises BodyTooLarge, BodyTimeout, or Refusal if the budget is used up.
        """
        parts, last, size, values = deque[bytes](), bytearray(), 0, 0
        while True:
            try:
                with anyio.fail_after(STALL_S):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeout(f"no part of the body arrived for {STALL_S:g} s; send it again") from None
            if message["type"] == "http.disconnect":
                return deque()
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > self._limit:
                raise _too_large(self._limit)
            self._reserve(size)
            last += part
            if self._is_json:
                values += part.count(b",") + part.count(b":")
                if values > MAX_JSON_VALUES:
                    raise BodyTooLarge(f"the JSON body has more than {MAX_JSON_VALUES} values; split the request")
            ended = not message.get("more_body", False)
            if ended or len(last) >= INLINE_BYTES:  # small parts are joined, because each object has memory overhead
                parts.append(bytes(last))
                last.clear()
            if ended:
                return parts

    def _reserve(self, size: int) -> None:
        missing = size - self._reserved
        if missing > 0:
            self._budget.reserve(missing)
            self._reserved = size

    def reserve_reply(self, size: int) -> None:
        self._reserve(self._reserved + size)

    def release(self) -> None:
        self._budget.release(self._reserved)
        self._reserved = 0


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body is larger than {limit} bytes; store large data under the storage root and pass its URI"
    )


class LargeJsonRoute(APIRoute):
    """A route that parses large JSON bodies in a thread, because FastAPI would parse them on the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_large(request: Request) -> Response:
            return await handle(_LargeJsonRequest(request.scope, request.receive))

        return handle_large


class _LargeJsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        return await run_by_size(len(body), json.loads, body)
