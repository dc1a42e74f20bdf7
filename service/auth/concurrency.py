"""Limits on the number of concurrent requests per caller, counted in this process.

As with rate limits, each replica counts separately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.web.errors import TooMany

RETRY_AFTER_S = 1.0


class ConcurrencyLimit:
    """A limit on concurrent requests, applied to each caller separately. Use only on the event loop."""

    def __init__(self, limit: int) -> None:
        self._limit, self._in_progress = limit, Counter[str]()

    @contextmanager
    def slot(self, caller: str, what: str) -> Iterator[None]:
        """Count a request as in progress. Raises TooMany if the caller has already reached the limit.

        `what` describes the requests in the error message.
        """
        if self._in_progress[caller] >= self._limit:
            message = f"{self._limit} {what} are in progress, which is the maximum; wait for one to end"
            raise TooMany(message, retry_after=RETRY_AFTER_S)
        self._in_progress[caller] += 1
        try:
            yield
        finally:
            self._in_progress[caller] -= 1
            if not self._in_progress[caller]:
                del self._in_progress[caller]
