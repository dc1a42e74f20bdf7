"""Errors raised by the client, and their translation from httpx errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
from pydantic import ValidationError

from service.web.errors import Problem

RETRYABLE_STATUSES = frozenset({429, 502, 503, 504})  # statuses after which the same request may succeed


class ApiError(Exception):
    """Raised when the service returns an error; `problem.code` is stable."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem.detail} ({self.problem.code})"


class NoAnswer(Exception):
    """Raised when the service cannot be reached, or when no service is found."""


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Raise ApiError for an error response, and NoAnswer if there is no response."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise ApiError(parse_problem(error.response)) from None
    except httpx.TransportError as error:
        origin, reason = "", f"the service does not respond ({error or type(error).__name__})"
        with contextlib.suppress(RuntimeError):  # the error has no request
            origin = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}: "
            if isinstance(error, httpx.ReadTimeout):
                seconds = error.request.extensions["timeout"]["read"]
                reason = f"no response within {seconds:g} s; the service may still be working on the request"
        raise NoAnswer(f"{origin}{reason}") from error


def parse_problem(response: httpx.Response) -> Problem:
    """Return the problem details of an error response, or generic details if a proxy sent the response."""
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        status, detail = response.status_code, f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
        code = f"http_{status}"
        return Problem(
            type=f"urn:amd:problem:{code}",
            title=response.reason_phrase,
            status=status,
            detail=detail,
            code=code,
            request_id=response.headers.get("X-Request-Id", ""),
            retryable=status in RETRYABLE_STATUSES,
        )
