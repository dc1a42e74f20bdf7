"""Base class for all client methods: requests with retries, listings, and resumable event streams and downloads."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

import httpx
from httpx_sse import EventSource, ServerSentEvent
from pydantic import BaseModel
from tenacity import AsyncRetrying

from service.client.errors import NoAnswer, translated_errors
from service.client.messages import api_path, fields_of, parse, present
from service.client.retries import Patience, retry_options

T = TypeVar("T")

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
DEADLINE_MARGIN_S = 10.0  # added to a request's deadline, for the control plane's own margin and transport
STREAM_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # longer than the interval of the server's heartbeats
POLL_INTERVAL_S = 0.5  # pause between polls while waiting for a state
PARTIAL_CONTENT = 206
END_EVENT = "end"  # the stream's last event


class AsyncApiMethods:
    """Base class of the client and its method groups."""

    _resource: ClassVar[tuple[str, ...]] = ()
    """Segments with which the paths of the group's requests begin."""

    def __init__(self, http: httpx.AsyncClient, patience: Patience) -> None:
        self._http = http
        self._patience = patience

    def _path(self, *segments: str) -> str:
        return api_path(*self._resource, *segments)

    async def _request(self, method: str, kind: type[T], *segments: str, **options: Any) -> T:
        """Send a request and parse its response. `options` are passed to `_send`."""
        response = await self._send(method, *segments, **options)
        return parse(kind, response.content)

    async def _send(
        self,
        method: str,
        *segments: str,
        path: str | None = None,
        query: Mapping[str, Any] | None = None,
        body: BaseModel | Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        accepted: tuple[int, ...] = (),
        repeatable: bool = False,
        deadline_s: float | None = None,
    ) -> httpx.Response:
        """Send a request, with retries. Raises ApiError or NoAnswer.

        `segments`: segments of the path after those of `_resource`.
        `path`: the entire path instead, for a resource outside `/v1`.
        `accepted`: error statuses for which the response is returned instead of raising ApiError.
        `repeatable`: whether a POST is safe to retry; other methods, and a POST with an Idempotency-Key, always are. A
        request with an If-Match never is.
        `deadline_s`: time that the service may take to respond. After a timeout, the request is not repeated, since the
        service may still be working on it.
        """
        path = path or self._path(*segments)
        given = headers or {}
        repeatable = repeatable or method != "POST" or "Idempotency-Key" in given
        repeatable = repeatable and "If-Match" not in given  # the first change modifies the ETag, so a second one fails
        content = fields_of(body) if isinstance(body, BaseModel) else body
        timeout = TIMEOUT if deadline_s is None else response_timeout(deadline_s)
        request = self._http.build_request(
            method, path, params=present(query or {}), json=content, headers=headers, timeout=timeout
        )

        async def attempt() -> httpx.Response:
            response = await self._http.send(request)
            return response if response.status_code in accepted else response.raise_for_status()

        with translated_errors():
            return await self._retrying(repeatable, after_timeout=deadline_s is None)(attempt)

    async def _pages(self, kind: type[Any], *segments: str, query: Mapping[str, Any]) -> AsyncIterator[Any]:
        """Yield the items of a listing, fetching pages as needed."""
        cursor: str | None = None
        while True:
            page = await self._request("GET", kind, *segments, query={**query, "cursor": cursor})
            for item in page.items:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    async def _events(
        self,
        read: Callable[[ServerSentEvent], T | None],
        *segments: str,
        query: Mapping[str, Any] | None = None,
        last_id: str | None = None,
    ) -> AsyncGenerator[T]:
        """Yield the result of `read` for each event of a stream until its `end` event, skipping None.

        If the connection drops, the stream resumes after the last event.
        """
        path = self._path(*segments)
        with translated_errors():
            async for attempt in self._retrying(repeatable=True):
                headers = present({"Accept": "text/event-stream", "Last-Event-ID": last_id})
                async with attempt, self._open(path, query, headers) as response:
                    async for event in EventSource(response).aiter_sse():
                        if not event.data:  # a heartbeat
                            continue
                        attempt.retry_state.attempt_number = 1  # the connection works: failures count anew
                        if event.event == END_EVENT:
                            return
                        if (item := read(event)) is not None:
                            yield item
                        last_id = event.id or last_id
                    raise NoAnswer(f"{path}: the stream was interrupted repeatedly before its end")

    async def _download(self, target: Path, *segments: str, query: Mapping[str, Any] | None = None) -> Path:
        """Write the response body to a file, atomically."""
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with part.open("wb") as written:
                await self._download_into(written, self._path(*segments), query)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    async def _download_into(self, into: BinaryIO, path: str, query: Mapping[str, Any] | None) -> None:
        """Write the response body to a file. Resumes if the connection drops and the service supports byte ranges."""
        tag: str | None = None
        with translated_errors():
            async for attempt in self._retrying(repeatable=True):
                headers = {"Accept-Encoding": "identity"}
                if tag is not None and (known := into.tell()):
                    headers |= {"Range": f"bytes={known}-", "If-Range": tag}
                async with attempt, self._open(path, query, headers) as response:
                    if response.status_code != PARTIAL_CONTENT:
                        into.seek(0)
                        into.truncate()
                    tag = response.headers.get("ETag")
                    async for chunk in response.aiter_bytes():
                        attempt.retry_state.attempt_number = 1
                        into.write(chunk)

    @asynccontextmanager
    async def _open(
        self, path: str, query: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """Open a streaming response; its body is read only if it is an error. Raises HTTPStatusError."""
        given = present(query or {})
        async with self._http.stream("GET", path, params=given, headers=headers, timeout=STREAM_TIMEOUT) as response:
            if not response.is_success:
                await response.aread()
                response.raise_for_status()
            yield response

    def _retrying(self, repeatable: bool, after_timeout: bool = True) -> AsyncRetrying:
        options = retry_options(self._patience, repeatable=repeatable, after_timeout=after_timeout)
        return AsyncRetrying(**options)


def response_timeout(deadline_s: float) -> httpx.Timeout:
    """Return timeouts that let the service, rather than the client, report a missed deadline."""
    return httpx.Timeout(TIMEOUT.read, connect=TIMEOUT.connect, read=deadline_s + DEADLINE_MARGIN_S)
