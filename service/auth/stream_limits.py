"""Limit the number and lifetime of event and log streams, and end streams whose key has become invalid.

A stream is authenticated once, when it is opened, and may then stay open for days. It therefore ends when the key or
token becomes invalid, or after a maximum lifetime. Its last event then asks the client to reconnect with
`Last-Event-ID`; the new request is authenticated. Streams are counted per process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import anyio
from anyio import CancelScope
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from service.auth.authentication import Authenticator, Principal
from service.web.errors import TooMany

logger = logging.getLogger(__name__)

CHECK_S = 2.0  # interval between checks for revoked keys
RETRY_AFTER_S = 5
RECONNECT = "event: reconnect\ndata: {}\n\n"


class StreamLimits:
    """Tracks and limits the open streams of each caller."""

    def __init__(self, authenticator: Authenticator, max_per_caller: int, lifetime_s: float) -> None:
        self._authenticator, self._max_per_caller, self._lifetime_s = authenticator, max_per_caller, lifetime_s
        self._open: dict[str, set[CancelScope]] = {}

    async def run(self) -> None:
        """Run until cancelled, ending the streams of revoked keys. A single query checks the keys of all streams."""
        while True:
            await asyncio.sleep(CHECK_S)
            if not self._open:
                continue
            try:
                invalid = await run_in_threadpool(self._authenticator.invalid_callers, list(self._open))
            except Exception as error:  # the database may be unavailable for a while
                logger.warning("the keys of open streams cannot be checked; will retry: %s", error)
                continue
            for caller in invalid & self._open.keys():
                for stream in self._open[caller]:
                    stream.cancel()

    def end_all(self) -> None:
        """Ask the clients of all streams to reconnect. During a shutdown, they then reach another control plane."""
        for streams in self._open.values():
            for stream in streams:
                stream.cancel()

    @contextmanager
    def admit(self, caller: Principal) -> Iterator[CancelScope]:
        """Count a stream while it is open. Yields the cancel scope in which to send the stream.

        Raises TooMany if the caller already has the maximum number of open streams.
        """
        opened = self._open.setdefault(caller.id, set())
        if len(opened) >= self._max_per_caller:
            raise TooMany(
                f"this key has {len(opened)} open event and log streams, and the maximum is {self._max_per_caller}; "
                "close one of them first",
                retry_after=RETRY_AFTER_S,
            )
        expires_in = math.inf if caller.expires_at is None else caller.expires_at - time.time()
        stream = CancelScope(deadline=anyio.current_time() + min(self._lifetime_s, expires_in))
        opened.add(stream)
        try:
            yield stream
        finally:
            opened.discard(stream)
            if not opened:
                del self._open[caller.id]


class LimitedStream(StreamingResponse):
    """A server-sent event stream that ends when its key or token becomes invalid, or at its maximum lifetime."""

    def __init__(self, events: AsyncIterator[str], caller: Principal, limits: StreamLimits) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._caller, self._limits = caller, limits

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises TooMany before the response starts if the caller has too many open streams."""
        with self._limits.admit(self._caller) as self._stream:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with self._stream:
            async for text in self.body_iterator:
                await send({"type": "http.response.body", "body": str(text).encode(), "more_body": True})
        last = RECONNECT if self._stream.cancelled_caught else ""
        await send({"type": "http.response.body", "body": last.encode(), "more_body": False})
