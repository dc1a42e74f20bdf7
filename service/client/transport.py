"""Retries, event streams and downloads as scripts, without performing any I/O.

A script is a generator that yields effects (send, sleep, read), like httpx's auth flows; `service.client` executes
them, blocking or with await, so both clients share this logic.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import httpx
from pydantic import ValidationError

from service.web.errors import Problem

T = TypeVar("T")

RETRYABLE_STATUSES = frozenset({429, 502, 503, 504})  # statuses after which the same request may succeed
RATE_LIMITED = 429  # rejected before it has any effect
PARTIAL_CONTENT = 206
END_EVENT = "end"  # the stream's last event


class ApiError(Exception):
    """The service returned an error; `problem.code` is stable."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem.detail} ({self.problem.code})"


class NoAnswer(Exception):
    """The service could not be reached, or no service was found."""


@dataclass(frozen=True)
class Patience:
    """Retry policy: pauses double, with jitter so that many clients do not retry at once."""

    tries: int = 8
    """Maximum number of attempts."""
    first_s: float = 0.25
    """Upper bound of the first pause in seconds."""
    most_s: float = 8.0
    """Upper bound of all pauses in seconds, except those that the service requests."""
    retry_after_most_s: float = 120.0
    """Longest Retry-After in seconds that is honoured; after a longer one, the client gives up."""

    def pause(self, failures: int, requested_s: float = 0.0) -> float | None:
        """Return the seconds until the next attempt after this many failures; None to give up."""
        if failures >= self.tries or requested_s > self.retry_after_most_s:
            return None
        doubled = min(self.most_s, self.first_s * 2.0 ** (failures - 1))
        return max(requested_s, doubled * random.uniform(0.5, 1.0))


# Calls and effects


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and the function that reads its response."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    accepted: tuple[int, ...] = ()
    """Error statuses that `read` accepts."""
    changes: bool = True
    """Whether repeating a POST without an Idempotency-Key has a second effect."""

    @property
    def repeatable(self) -> bool:
        """Whether the request may be resent although it may have been executed."""
        return self.method != "POST" or not self.changes or "Idempotency-Key" in self.headers


class Send(NamedTuple):
    """Send a request. Returns the complete response, or raises httpx.TransportError."""

    call: Call[Any]


class Open(NamedTuple):
    """Send a request. Returns the response with its body unread."""

    call: Call[Any]


class Read(NamedTuple):
    """Read the opened response. Returns the next bytes, or None at its end."""


class Sleep(NamedTuple):
    seconds: float


class Emit(NamedTuple):
    """Yield an item to the caller."""

    value: Any


Effect = Send | Open | Read | Sleep | Emit
Steps = Generator[Effect, Any, T]


class Script(Generic[T]):
    """A sequence of effects that emits one or more values of type T."""

    def __init__(self, steps: Callable[[Patience], Steps[None]]) -> None:
        self.steps = steps


def once(call: Call[T]) -> Script[T]:
    """Make a script from a single call."""

    def steps(patience: Patience) -> Steps[None]:
        yield Emit((yield from exchange(call, patience)))

    return Script(steps)


def exchange(call: Call[T], patience: Patience) -> Steps[T]:
    """Send a call, with retries, and return the parsed response. Raises ApiError or NoAnswer."""
    failures = 0
    while True:
        failures += 1
        try:
            response: httpx.Response = yield Send(call)
        except httpx.TransportError as error:
            arrived = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            pause = None if arrived and not call.repeatable else patience.pause(failures)
            if pause is None:
                raise _no_response_error(error) from error
        else:
            if response.is_success or response.status_code in call.accepted:
                return call.read(response)
            pause = _retry_pause(response, call, failures, patience)
        yield Sleep(pause)


def _retry_pause(response: httpx.Response, call: Call[Any], failures: int, patience: Patience) -> float:
    """Return the seconds until the next attempt after an error response. Raises ApiError if it must not be retried."""
    found = _parse_problem(response)
    is_retryable = found.retryable or response.status_code in RETRYABLE_STATUSES
    if is_retryable and (call.repeatable or response.status_code == RATE_LIMITED):
        pause = patience.pause(failures, _retry_after(response))
        if pause is not None:
            return pause
    raise ApiError(found)


def _parse_problem(response: httpx.Response) -> Problem:
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:  # from a proxy in front of the service
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


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _no_response_error(error: httpx.TransportError) -> NoAnswer:
    origin = ""
    with contextlib.suppress(RuntimeError):  # the error has no request
        origin = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}: "
    return NoAnswer(f"{origin}the service does not respond ({error or type(error).__name__})")


# Server-sent events


class ServerEvent(NamedTuple):
    id: str | None
    name: str
    data: str


class EventReader:
    """Incremental parser of server-sent events. Incomplete events at the end of a broken connection are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, str] = {}

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        # Not str.splitlines, which also splits at other characters, such as U+2028.
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.removesuffix(b"\r").decode().partition(":")
            value = value.removeprefix(" ")
            if name == "data" and "data" in self._fields:
                value = f"{self._fields['data']}\n{value}"
            if name:
                self._fields[name] = value
            elif not line.strip():
                fields, self._fields = self._fields, {}
                if "data" in fields:
                    yield ServerEvent(fields.get("id"), fields.get("event", "message"), fields["data"])


def stream_events(
    path: str,
    query: Mapping[str, Any],
    read: Callable[[ServerEvent], Any],
    patience: Patience,
    last_id: str | None = None,
) -> Steps[ServerEvent]:
    """Emit the result of `read` for each event of a stream; return its `end` event.

    A broken connection is resumed after the last event. Events for which `read` returns None are skipped.
    """
    failures = 0
    while True:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
        call = Call("GET", path, ignore_body, query, headers=headers)
        broken = NoAnswer(f"{path}: the stream was interrupted repeatedly before its end")
        pause: float | None = None
        try:
            response: httpx.Response = yield Open(call)
            if response.is_success:
                events = EventReader()
                while (chunk := (yield Read())) is not None:
                    for event in events.feed(chunk):
                        failures = 0
                        if event.name == END_EVENT:
                            return event
                        if (item := read(event)) is not None:
                            yield Emit(item)
                        last_id = event.id or last_id
            else:
                pause = _retry_pause(response, call, failures + 1, patience)
        except httpx.TransportError as error:
            broken = _no_response_error(error)
        failures += 1
        pause = patience.pause(failures) if pause is None else pause
        if pause is None:
            raise broken
        yield Sleep(pause)


# Files


def download_to(path: str, query: Mapping[str, Any], into: BinaryIO, patience: Patience) -> Steps[None]:
    """Write the response body to a file. A broken connection is resumed if the service supports byte ranges."""
    failures, tag = 0, None
    while True:
        headers = {"Accept-Encoding": "identity"}
        if tag is not None and (known := into.tell()):
            headers |= {"Range": f"bytes={known}-", "If-Range": tag}
        call = Call("GET", path, ignore_body, query, headers=headers)
        broken: NoAnswer | None = None
        pause: float | None = None
        try:
            response: httpx.Response = yield Open(call)
            if response.is_success:
                if response.status_code != PARTIAL_CONTENT:
                    into.seek(0)
                    into.truncate()
                tag = response.headers.get("ETag")
                while (chunk := (yield Read())) is not None:
                    failures = 0
                    into.write(chunk)
                return
            pause = _retry_pause(response, call, failures + 1, patience)
        except httpx.TransportError as error:
            broken = _no_response_error(error)
        failures += 1
        pause = patience.pause(failures) if pause is None else pause
        if pause is None:
            assert broken is not None, "an error response sets a pause or raises"
            raise broken
        yield Sleep(pause)


def ignore_body(response: httpx.Response) -> None:
    return None
