"""How a request is carried out: sent, tried again, read as a stream. Without doing any of it.

A script is a generator that yields what is to be done (send, wait, read on), as httpx's auth flows are;
`service.client` does it, blocking or awaiting, so that neither repeats the other. Knows nothing of jobs.
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

LATER = frozenset({429, 502, 503, 504})  # statuses after which the same request may succeed
NOT_DONE = 429  # a refusal before anything was done
PARTIAL = 206
END = "end"  # the stream's last event


class ApiError(Exception):
    """The service's answer is an error; `problem.code` is stable."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem.detail} ({self.problem.code})"


class NoAnswer(Exception):
    """The service could not be reached, or none is known."""


@dataclass(frozen=True)
class Patience:
    """How a request is tried again: pauses double, with jitter, so that many clients do not come back at once."""

    tries: int = 8
    first_s: float = 0.25
    most_s: float = 8.0
    retry_after_most_s: float = 120.0
    """Of a pause that the service asks for."""

    def pause(self, failures: int, asked: float = 0.0) -> float | None:
        """Seconds until the next try after so many failures; None: give up."""
        if failures >= self.tries or asked > self.retry_after_most_s:
            return None
        doubled = min(self.most_s, self.first_s * 2.0 ** (failures - 1))
        return max(asked, doubled * random.uniform(0.5, 1.0))


# What is asked for, and what doing it asks for


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    accepted: tuple[int, ...] = ()
    """Statuses of errors that are an answer here."""
    changes: bool = True
    """Whether to be carried out twice would be another thing than once; of POST without an Idempotency-Key only."""

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again although it may have been carried out."""
        return self.method != "POST" or not self.changes or "Idempotency-Key" in self.headers


class Send(NamedTuple):
    """Sent; the answer comes back whole, or httpx.TransportError is thrown."""

    call: Call[Any]


class Open(NamedTuple):
    """Sent; the answer comes back with its body still to be read."""

    call: Call[Any]


class ReadOn(NamedTuple):
    """The next bytes of what was opened come back; None at its end."""


class Sleep(NamedTuple):
    seconds: float


class Emit(NamedTuple):
    """An item for whoever called."""

    value: Any


Effect = Send | Open | ReadOn | Sleep | Emit
Steps = Generator[Effect, Any, T]


class Script(Generic[T]):
    """What emits one T, or one after the other."""

    def __init__(self, steps: Callable[[Patience], Steps[None]]) -> None:
        self.steps = steps


def once(call: Call[T]) -> Script[T]:
    def steps(patience: Patience) -> Steps[None]:
        yield Emit((yield from exchange(call, patience)))

    return Script(steps)


def exchange(call: Call[T], patience: Patience) -> Steps[T]:
    failures = 0
    while True:
        failures += 1
        try:
            answer: httpx.Response = yield Send(call)
        except httpx.TransportError as error:
            arrived = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            pause = None if arrived and not call.repeatable else patience.pause(failures)
            if pause is None:
                raise _no_answer(error) from error
        else:
            if answer.is_success or answer.status_code in call.accepted:
                return call.read(answer)
            pause = _pause_after(answer, call, failures, patience)
        yield Sleep(pause)


def _pause_after(answer: httpx.Response, call: Call[Any], failures: int, patience: Patience) -> float:
    """After an answer that is an error: how long to wait for the next try. Raises ApiError where there is none."""
    found = _problem(answer)
    later = found.retryable or answer.status_code in LATER
    if later and (call.repeatable or answer.status_code == NOT_DONE):
        pause = patience.pause(failures, _retry_after(answer))
        if pause is not None:
            return pause
    raise ApiError(found)


def _problem(answer: httpx.Response) -> Problem:
    try:
        return Problem.model_validate_json(answer.content)
    except ValidationError:  # of something between us and the service
        status, detail = answer.status_code, f"HTTP {answer.status_code} {answer.reason_phrase}".rstrip()
        code = f"http_{status}"
        return Problem(
            type=f"urn:amd:problem:{code}",
            title=answer.reason_phrase,
            status=status,
            detail=detail,
            code=code,
            request_id=answer.headers.get("X-Request-Id", ""),
            retryable=status in LATER,
        )


def _retry_after(answer: httpx.Response) -> float:
    text = answer.headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _no_answer(error: httpx.TransportError) -> NoAnswer:
    where = ""
    with contextlib.suppress(RuntimeError):  # an error that belongs to no request
        where = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}: "
    return NoAnswer(f"{where}the service does not answer ({error or type(error).__name__})")


# Server-sent events


class ServerEvent(NamedTuple):
    id: str | None
    name: str
    data: str


class EventReader:
    """Bytes to events. An event counts once it is whole: what a broken connection cuts off was never there."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, str] = {}

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        # Split by hand: str.splitlines also cuts at characters that are part of the data.
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


def listen(
    path: str,
    query: Mapping[str, Any],
    read: Callable[[ServerEvent], Any],
    patience: Patience,
    last_id: str | None = None,
) -> Steps[ServerEvent]:
    """Emit what is read of a stream's events, up to its `end`, which is returned.

    A broken connection is taken up where it broke. `read`: None for an event that is of no interest.
    """
    seen, failures = last_id, 0
    while True:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": seen} if seen else {})}
        call = Call("GET", path, nothing, query, headers=headers)
        broken = NoAnswer(f"{path}: the stream ends again and again before its end")
        pause: float | None = None
        try:
            answer: httpx.Response = yield Open(call)
            if answer.is_success:
                events = EventReader()
                while (chunk := (yield ReadOn())) is not None:
                    for event in events.feed(chunk):
                        failures = 0
                        if event.name == END:
                            return event
                        if (item := read(event)) is not None:
                            yield Emit(item)
                        seen = event.id or seen
            else:
                pause = _pause_after(answer, call, failures + 1, patience)
        except httpx.TransportError as error:
            broken = _no_answer(error)
        failures += 1
        pause = patience.pause(failures) if pause is None else pause
        if pause is None:
            raise broken
        yield Sleep(pause)


# Files


def fetch(path: str, query: Mapping[str, Any], into: BinaryIO, patience: Patience) -> Steps[None]:
    """Write what a path answers with. A broken connection is taken up where it broke, if the service can send parts."""
    failures, tag = 0, None
    while True:
        headers = {"Accept-Encoding": "identity"}
        if tag is not None and (known := into.tell()):
            headers |= {"Range": f"bytes={known}-", "If-Range": tag}
        call = Call("GET", path, nothing, query, headers=headers)
        broken: NoAnswer | None = None
        pause: float | None = None
        try:
            answer: httpx.Response = yield Open(call)
            if answer.is_success:
                if answer.status_code != PARTIAL:
                    into.seek(0)
                    into.truncate()
                tag = answer.headers.get("ETag")
                while (chunk := (yield ReadOn())) is not None:
                    failures = 0
                    into.write(chunk)
                return
            pause = _pause_after(answer, call, failures + 1, patience)
        except httpx.TransportError as error:
            broken = _no_answer(error)
        failures += 1
        pause = patience.pause(failures) if pause is None else pause
        if pause is None:
            assert broken is not None, "an answer that is an error has its pause, or was raised"
            raise broken
        yield Sleep(pause)


def nothing(answer: httpx.Response) -> None:
    return None
