"""Rate limits per caller, counted in this process over a moving window.

Each replica counts separately, so with several replicas a caller may reach a multiple of the limit. This is sufficient
protection against runaway clients, and no request has to wait for a shared counter.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.web.errors import TooMany


class RateLimitStatus(NamedTuple):
    """A caller's current usage of a rate limit."""

    limit: int
    remaining: int
    reset_s: int
    """Seconds until the oldest counted request leaves the window."""


class RateLimit:
    """A limit such as 1200 requests per minute, applied to each caller separately."""

    def __init__(self, text: str) -> None:
        """Parse a limit such as `1200/minute`. Raises ValueError if it is invalid."""
        self._item = parse(text)
        self._window = MovingWindowRateLimiter(MemoryStorage())

    def take(self, caller: str) -> bool:
        """Count a request; return whether it is within the limit."""
        return self._window.hit(self._item, caller)

    def status(self, caller: str) -> RateLimitStatus:
        reset, remaining = self._window.get_window_stats(self._item, caller)
        return RateLimitStatus(self._item.amount, remaining, max(0, math.ceil(reset - time.time())))

    def too_many(self, caller: str, what: str) -> TooMany:
        wait = max(1, self.status(caller).reset_s)
        return TooMany(f"{what} exceed {self._item}; try again in {wait} s", retry_after=wait)


class RateLimitHeaders:
    """ASGI middleware that adds the caller's rate-limit status to every response, including streams and errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            status: RateLimitStatus | None = scope.get("state", {}).get("rate_limit")
            if message["type"] == "http.response.start" and status is not None:
                headers = MutableHeaders(scope=message)
                headers["RateLimit-Limit"] = str(status.limit)
                headers["RateLimit-Remaining"] = str(status.remaining)
                headers["RateLimit-Reset"] = str(status.reset_s)
            await send(message)

        await self._app(scope, receive, send_with_headers)
