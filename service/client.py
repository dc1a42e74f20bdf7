"""The REST interface as typed Python: `Client`, and `AsyncClient` which awaits the same calls.

    with Client.from_environment() as amd:
        job = amd.jobs.submit(JobRequest(kind="train", preset="demo-image-amd"))
        print(*amd.jobs.logs(job.id, follow=True), sep="")

Each call is described once, as a script (`service.wire`): what it sends and how the answer is read. Torch-free.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter

from service.jobs.kinds import JobKind
from service.jobs.schemas import (
    ENDED,
    CancelRequest,
    CheckpointView,
    EventView,
    JobDetail,
    JobPage,
    JobRequest,
    JobView,
    MetricsView,
    State,
    TrialView,
    ValidateView,
)
from service.keys import KeyList, KeyRequest, KeyView, NewKeyView
from service.wire import (
    ApiError,
    Call,
    Effect,
    Emit,
    NoAnswer,
    Open,
    Patience,
    ReadOn,
    Script,
    Send,
    ServerEvent,
    Sleep,
    Steps,
    exchange,
    listen,
    nothing,
    once,
)

__all__ = ["ApiError", "AsyncClient", "Client", "JobRequest", "NoAnswer", "Patience"]

T = TypeVar("T")
P = ParamSpec("P")

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
STREAM_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # heartbeats come more often
LOOK_S, LOOK_MOST_S = 0.5, 3.0  # between two looks of `wait`

# The calls


def _view(kind: type[T] | Any) -> Callable[[httpx.Response], T]:
    """Reads an answer; fields that a newer service adds are passed over."""
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    return lambda answer: adapter.validate_json(answer.content, extra="ignore")


def _given(**query: Any) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def job_submit(request: JobRequest, key: str | None = None) -> Script[JobView]:
    """Accept a job. `key`: the Idempotency-Key; one is made for this call where none is given."""
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    body = request.model_dump(mode="json", exclude_unset=True)
    return once(Call("POST", "/v1/jobs", _view(JobView), body=body, headers=headers))


def job_get(job_id: str) -> Script[JobDetail]:
    return once(_get_job(job_id))


def _get_job(job_id: str) -> Call[JobDetail]:
    return Call("GET", f"/v1/jobs/{quote(job_id, safe='')}", _view(JobDetail))


def job_list(
    *,
    kind: JobKind | None = None,
    state: State | None = None,
    labels: Mapping[str, str] | None = None,
    project: str | None = None,
    page: int = 200,
) -> Script[JobView]:
    """All jobs that fit, newest first; pages are fetched as they are needed."""
    pairs = [f"{key}={value}" for key, value in (labels or {}).items()]
    query = _given(kind=kind, state=state, label=pairs or None, project=project, limit=page)

    def steps(patience: Patience) -> Steps[None]:
        cursor: str | None = None
        while True:
            call: Call[JobPage] = Call("GET", "/v1/jobs", _view(JobPage), query | _given(cursor=cursor))
            found = yield from exchange(call, patience)
            for job in found.items:
                yield Emit(job)
            cursor = found.next_cursor
            if cursor is None:
                return

    return Script(steps)


def _act(job_id: str, action: str, body: Mapping[str, Any] | None = None, changes: bool = False) -> Script[JobView]:
    path = f"/v1/jobs/{quote(job_id, safe='')}/{action}"
    return once(Call("POST", path, _view(JobView), body=body, changes=changes))


def job_cancel(job_id: str, deadline_s: float | None = None) -> Script[JobView]:
    """Stop for good, with a last checkpoint. `deadline_s`: how long that may take."""
    return _act(job_id, "cancel", CancelRequest(deadline_s=deadline_s).model_dump(mode="json", exclude_none=True))


def job_pause(job_id: str) -> Script[JobView]:
    """Stop with a last checkpoint; `resume` goes on from it."""
    return _act(job_id, "pause")


def job_resume(job_id: str) -> Script[JobView]:
    return _act(job_id, "resume", changes=True)


def job_retry(job_id: str) -> Script[JobView]:
    """Start a job that has ended once more, from its newest checkpoint."""
    return _act(job_id, "retry", changes=True)


def job_delete(job_id: str) -> Script[None]:
    """Forget a job that has ended."""
    return once(Call("DELETE", f"/v1/jobs/{quote(job_id, safe='')}", nothing))


def job_wait(job_id: str, timeout_s: float | None = None) -> Script[JobDetail]:
    """The job once it has ended. Raises TimeoutError."""

    def steps(patience: Patience) -> Steps[None]:
        until, look = None if timeout_s is None else time.monotonic() + timeout_s, LOOK_S
        while True:
            job = yield from exchange(_get_job(job_id), patience)
            if job.state in ENDED:
                yield Emit(job)
                return
            if until is not None and time.monotonic() + look > until:
                raise TimeoutError(f"{job_id} is still {job.state} after {timeout_s:g} s")
            yield Sleep(look)
            look = min(LOOK_MOST_S, look * 1.5)

    return Script(steps)


def job_logs(job_id: str, *, follow: bool = False, attempt: int | None = None, tail: int | None = None) -> Script[str]:
    """The job's output in pieces. `tail`: the last lines only; `attempt`: none for the newest.

    With `follow` what comes too: of that attempt, or of all until the job has ended or is paused.
    """
    path = f"/v1/jobs/{quote(job_id, safe='')}/logs"
    if not follow:
        return once(Call("GET", path, lambda answer: answer.text, _given(attempt=attempt, tail=tail)))

    def steps(patience: Patience) -> Steps[None]:
        told = 0
        while True:
            job = yield from exchange(_get_job(job_id), patience)
            if job.attempt > told:
                first, told = told == 0, attempt or job.attempt
                query = _given(follow="true", attempt=told, tail=tail if first else None)
                yield from listen(path, query, _log_piece, patience)
                if attempt is not None:
                    return
            elif job.state in (*ENDED, "paused"):
                return
            else:
                yield Sleep(LOOK_S)

    return Script(steps)


def _log_piece(event: ServerEvent) -> str | None:
    return str(json.loads(event.data)["text"]) if event.name == "log" else None


def job_events(job_id: str, *, after: int = 0) -> Script[EventView]:
    """The job's history, and what comes until it has ended. `after`: only events with a higher id."""
    path = f"/v1/jobs/{quote(job_id, safe='')}/events"

    def steps(patience: Patience) -> Steps[None]:
        yield from listen(path, {}, _job_event, patience, str(after) if after else None)

    return Script(steps)


_EVENT: TypeAdapter[EventView] = TypeAdapter(EventView)


def _job_event(event: ServerEvent) -> EventView | None:
    return _EVENT.validate_json(event.data, extra="ignore") if event.name == "job" else None


def job_metrics(job_id: str, names: Sequence[str] = (), max_points: int | None = None) -> Script[MetricsView]:
    query = _given(names=",".join(names) or None, max_points=max_points)
    return once(Call("GET", f"/v1/jobs/{quote(job_id, safe='')}/metrics", _view(MetricsView), query))


def job_trials(job_id: str) -> Script[list[TrialView]]:
    return once(Call("GET", f"/v1/jobs/{quote(job_id, safe='')}/trials", _view(list[TrialView])))


def job_checkpoints(job_id: str) -> Script[list[CheckpointView]]:
    return once(Call("GET", f"/v1/jobs/{quote(job_id, safe='')}/checkpoints", _view(list[CheckpointView])))


def preset_list() -> Script[list[dict[str, Any]]]:
    return once(Call("GET", "/v1/presets", _view(list[dict[str, Any]])))


def preset_get(name: str) -> Script[dict[str, Any]]:
    return once(Call("GET", f"/v1/presets/{quote(name, safe='')}", _view(dict[str, Any])))


def schema(kind: JobKind) -> Script[dict[str, Any]]:
    """JSON schema of a kind's config."""
    return once(Call("GET", f"/v1/schemas/{kind}", _view(dict[str, Any])))


def validate(request: JobRequest) -> Script[ValidateView]:
    """What a request comes to, without running it."""
    body = request.model_dump(mode="json", exclude_unset=True)
    return once(Call("POST", "/v1/validate", _view(ValidateView), body=body, changes=False))


def health() -> Script[dict[str, Any]]:
    """What /readyz says of its parts, also where it is not ready."""
    return once(Call("GET", "/readyz", _view(dict[str, Any]), accepted=(503,)))


def key_create(request: KeyRequest) -> Script[NewKeyView]:
    """The one answer that holds the key itself. Never sent twice: a lost answer would leave a key that nobody knows."""
    return once(Call("POST", "/v1/keys", _view(NewKeyView), body=request.model_dump(mode="json")))


def key_list() -> Script[list[KeyView]]:
    whole: Callable[[httpx.Response], KeyList] = _view(KeyList)
    return once(Call("GET", "/v1/keys", lambda answer: whole(answer).items))


def key_revoke(key_id: str) -> Script[None]:
    return once(Call("DELETE", f"/v1/keys/{quote(key_id, safe='')}", nothing))


# Doing it


class _Blocking:
    """What has the methods of a blocking client."""

    def __init__(self, run: Callable[[Script[Any]], Iterator[Any]]) -> None:
        self._run = run


class _Awaiting:
    """What has the methods of an awaiting client."""

    def __init__(self, run: Callable[[Script[Any]], AsyncIterator[Any]]) -> None:
        self._run = run


def _one(describe: Callable[P, Script[T]]) -> Callable[Concatenate[_Blocking, P], T]:
    @functools.wraps(describe)
    def method(of: _Blocking, /, *args: P.args, **kwargs: P.kwargs) -> T:
        (item,) = of._run(describe(*args, **kwargs))
        return item  # type: ignore[no-any-return]

    return method


def _many(describe: Callable[P, Script[T]]) -> Callable[Concatenate[_Blocking, P], Iterator[T]]:
    @functools.wraps(describe)
    def method(of: _Blocking, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return of._run(describe(*args, **kwargs))

    return method


def _one_later(describe: Callable[P, Script[T]]) -> Callable[Concatenate[_Awaiting, P], Awaitable[T]]:
    @functools.wraps(describe)
    async def method(of: _Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> T:
        (item,) = [item async for item in of._run(describe(*args, **kwargs))]
        return item  # type: ignore[no-any-return]

    return method


def _many_later(describe: Callable[P, Script[T]]) -> Callable[Concatenate[_Awaiting, P], AsyncIterator[T]]:
    @functools.wraps(describe)
    def method(of: _Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return of._run(describe(*args, **kwargs))

    return method


class Jobs(_Blocking):
    submit = _one(job_submit)
    get = _one(job_get)
    list = _many(job_list)
    cancel = _one(job_cancel)
    pause = _one(job_pause)
    resume = _one(job_resume)
    retry = _one(job_retry)
    delete = _one(job_delete)
    wait = _one(job_wait)
    logs = _many(job_logs)
    events = _many(job_events)
    metrics = _one(job_metrics)
    trials = _one(job_trials)
    checkpoints = _one(job_checkpoints)


class AsyncJobs(_Awaiting):
    submit = _one_later(job_submit)
    get = _one_later(job_get)
    list = _many_later(job_list)
    cancel = _one_later(job_cancel)
    pause = _one_later(job_pause)
    resume = _one_later(job_resume)
    retry = _one_later(job_retry)
    delete = _one_later(job_delete)
    wait = _one_later(job_wait)
    logs = _many_later(job_logs)
    events = _many_later(job_events)
    metrics = _one_later(job_metrics)
    trials = _one_later(job_trials)
    checkpoints = _one_later(job_checkpoints)


class Keys(_Blocking):
    create = _one(key_create)
    list = _one(key_list)
    revoke = _one(key_revoke)


class AsyncKeys(_Awaiting):
    create = _one_later(key_create)
    list = _one_later(key_list)
    revoke = _one_later(key_revoke)


class Client(_Blocking):
    """Blocking. Raises ApiError for an answer that is an error, NoAnswer where none comes."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: Patience | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(self._carry_out)
        self._http = httpx.Client(base_url=url, headers=_headers(key), timeout=TIMEOUT, transport=transport)
        self._patience = patience or Patience()
        self.jobs = Jobs(self._run)
        self.keys = Keys(self._run)

    presets = _one(preset_list)
    preset = _one(preset_get)
    schema = _one(schema)
    validate = _one(validate)
    health = _one(health)

    @classmethod
    def from_environment(cls, **how: Any) -> Client:
        """Of AMD_URL with AMD_KEY or AMD_KEY_FILE, else the stack that `amd up` started here. Raises NoAnswer."""
        return cls(*find_service(), **how)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _carry_out(self, script: Script[Any]) -> Iterator[Any]:
        steps, opened = script.steps(self._patience), contextlib.ExitStack()
        outcome: Any = None
        with opened:
            while (effect := _advance(steps, outcome)) is not None:
                outcome = None
                try:
                    match effect:
                        case Emit(item):
                            yield item
                        case Sleep(seconds):
                            time.sleep(seconds)
                        case Send(call):
                            outcome = self._http.send(_request(self._http, call))
                        case Open(call):
                            opened.close()
                            outcome = self._http.send(_request(self._http, call, STREAM_TIMEOUT), stream=True)
                            opened.callback(outcome.close)
                            chunks = outcome.iter_bytes()
                            if outcome.is_error:
                                outcome.read()
                        case ReadOn():
                            outcome = next(chunks, None)
                except httpx.TransportError as error:
                    outcome = error


class AsyncClient(_Awaiting):
    """The same, awaiting."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: Patience | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(self._carry_out)
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), timeout=TIMEOUT, transport=transport)
        self._patience = patience or Patience()
        self.jobs = AsyncJobs(self._run)
        self.keys = AsyncKeys(self._run)

    presets = _one_later(preset_list)
    preset = _one_later(preset_get)
    schema = _one_later(schema)
    validate = _one_later(validate)
    health = _one_later(health)

    @classmethod
    def from_environment(cls, **how: Any) -> AsyncClient:
        return cls(*find_service(), **how)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _carry_out(self, script: Script[Any]) -> AsyncIterator[Any]:
        steps, opened = script.steps(self._patience), contextlib.AsyncExitStack()
        outcome: Any = None
        async with opened:
            while (effect := _advance(steps, outcome)) is not None:
                outcome = None
                try:
                    match effect:
                        case Emit(item):
                            yield item
                        case Sleep(seconds):
                            await asyncio.sleep(seconds)
                        case Send(call):
                            outcome = await self._http.send(_request(self._http, call))
                        case Open(call):
                            await opened.aclose()
                            outcome = await self._http.send(_request(self._http, call, STREAM_TIMEOUT), stream=True)
                            opened.push_async_callback(outcome.aclose)
                            chunks = outcome.aiter_bytes()
                            if outcome.is_error:
                                await outcome.aread()
                        case ReadOn():
                            outcome = await anext(chunks, None)
                except httpx.TransportError as error:
                    outcome = error


def _advance(steps: Steps[None], outcome: Any) -> Effect | None:
    """Tell a script how it went; what it asks for next, None at its end."""
    try:
        return steps.throw(outcome) if isinstance(outcome, httpx.TransportError) else steps.send(outcome)
    except StopIteration:
        return None


def _request(
    http: httpx.Client | httpx.AsyncClient, call: Call[Any], timeout: httpx.Timeout = TIMEOUT
) -> httpx.Request:
    return http.build_request(
        call.method, call.path, params=call.query, json=call.body, headers=call.headers, timeout=timeout
    )


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


# Finding it


class Found(NamedTuple):
    url: str
    key: str | None


def find_service() -> Found:
    """The service that the environment names, else the stack that runs here. Raises NoAnswer with the remedy."""
    url, key, key_file = (os.environ.get(name) or None for name in ("AMD_URL", "AMD_KEY", "AMD_KEY_FILE"))
    if url is None:
        from service.stack import find_stack

        stack = find_stack()
        if stack is None:
            raise NoAnswer("no service is known here: start one with `amd up`, or set AMD_URL and AMD_KEY")
        url, key_file = stack.url, key_file or str(stack.key_file)
    if key is None and key_file is not None:
        try:
            key = Path(key_file).expanduser().read_text().strip()
        except OSError as error:
            raise NoAnswer(f"AMD_KEY_FILE={key_file}: cannot be read ({error.strerror})") from None
    return Found(url, key)
