"""How often a caller may ask: a moving window, counted in this process.

Every replica counts for itself, so with several a caller gets up to that many times the limit: enough against runaway
clients, which is what it is for, and no request waits for a shared counter.
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


class Standing(NamedTuple):
    """Where a caller stands with its limit."""

    limit: int
    remaining: int
    reset_s: int
    """Until the oldest counted request no longer counts."""


class RateLimit:
    def __init__(self, text: str) -> None:
        """`text`: such as `1200/minute`. Raises ValueError."""
        self._item = parse(text)
        self._window = MovingWindowRateLimiter(MemoryStorage())

    def take(self, who: str) -> bool:
        """Count one; whether it is within the limit."""
        return self._window.hit(self._item, who)

    def standing(self, who: str) -> Standing:
        reset, remaining = self._window.get_window_stats(self._item, who)
        return Standing(self._item.amount, remaining, max(0, math.ceil(reset - time.time())))

    def too_many(self, who: str, what: str) -> TooMany:
        wait = max(1, self.standing(who).reset_s)
        return TooMany(f"more {what} than {self._item}; try again in {wait} s", retry_after=wait)


class RateLimitHeaders:
    """ASGI middleware: where the caller stands with its limit is told in every answer, streams and errors too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            standing: Standing | None = scope.get("state", {}).get("rate_limit")
            if message["type"] == "http.response.start" and standing is not None:
                headers = MutableHeaders(scope=message)
                headers["RateLimit-Limit"] = str(standing.limit)
                headers["RateLimit-Remaining"] = str(standing.remaining)
                headers["RateLimit-Reset"] = str(standing.reset_s)
            await send(message)

        await self._app(scope, receive, tell)
