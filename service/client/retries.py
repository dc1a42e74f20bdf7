"""Retry policy: which failures the client retries, and how long it waits in between. Retries use tenacity."""

from __future__ import annotations

import contextlib
import math
import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception

from service.client.errors import RETRYABLE_STATUSES, NoAnswer, parse_problem

RATE_LIMITED = 429  # rejected before it has any effect


@dataclass(frozen=True)
class Patience:
    """Retry policy: pauses double each time, with jitter so that clients do not retry simultaneously."""

    tries: int = 8
    """Maximum number of attempts."""
    first_s: float = 0.25
    """Upper bound on the first pause, in seconds."""
    most_s: float = 8.0
    """Upper bound on every pause, in seconds, except those that the service requests."""
    retry_after_most_s: float = 120.0
    """Longest Retry-After, in seconds, that the client honours. The client gives up if it is longer."""

    def pause(self, failures: int, requested_s: float = 0.0) -> float | None:
        """Return the pause in seconds after this many failures, or None to give up."""
        if failures >= self.tries or requested_s > self.retry_after_most_s:
            return None
        doubled = min(self.most_s, self.first_s * 2.0 ** (failures - 1))
        return max(requested_s, doubled * random.uniform(0.5, 1.0))


def retry_options(patience: Patience, *, repeatable: bool, after_timeout: bool = True) -> dict[str, Any]:
    """Return the options of tenacity's `Retrying` and `AsyncRetrying`.

    `repeatable`: whether to resend a request that may already have been executed. `after_timeout`: whether to resend a
    request that may still be in progress.
    """

    def wait(state: RetryCallState) -> float:
        assert state.outcome is not None, "an attempt has failed"
        pause = patience.pause(state.attempt_number, _retry_after(state.outcome.exception()))
        return math.inf if pause is None else pause

    return {
        "retry": retry_if_exception(lambda error: _is_retryable(error, repeatable, after_timeout)),
        "wait": wait,
        "stop": lambda state: math.isinf(state.upcoming_sleep),
        "reraise": True,
    }


def _is_retryable(error: BaseException, repeatable: bool, after_timeout: bool) -> bool:
    match error:
        case httpx.ReadTimeout():
            return repeatable and after_timeout
        case httpx.HTTPStatusError(response=httpx.Response(status_code=httpx.codes.GATEWAY_TIMEOUT)):
            return repeatable and after_timeout
        case httpx.HTTPStatusError(response=response):
            may_succeed = response.status_code in RETRYABLE_STATUSES or parse_problem(response).retryable
            return may_succeed and (repeatable or response.status_code == RATE_LIMITED)
        case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():  # the request was not sent
            return True
        case httpx.TransportError() | NoAnswer():
            return repeatable
        case _:
            return False


def _retry_after(error: BaseException | None) -> float:
    """Return the pause in seconds that the service requests, or 0 if it requests none."""
    text = error.response.headers.get("Retry-After", "") if isinstance(error, httpx.HTTPStatusError) else ""
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
