"""Both clients against a server that rejects requests, breaks streams and sends unexpected responses."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st

from service.client import ApiError, AsyncClient, Client, JobRequest, NoAnswer, Patience
from service.client.transport import EventReader, ServerEvent

AT = "2026-01-01T00:00:00Z"
LOG = "step 1\rstep 2\nodd: \u2028 \x85 \x0b ü 漢\n\n" * 20


def job(job_id: str, **fields: Any) -> dict[str, Any]:
    """Return the JSON of a job."""
    empty = dict.fromkeys(
        ("name", "preset", "reason", "time_limit_s", "started_at", "ended_at", "progress", "failure", "result")
    )
    origin = {"created_at": AT, "changed_at": AT, "created_by": "key", "origin": "api", "project": "default"}
    counts = {"priority": 0, "attempt": 0, "max_retries": 3, "workers": 1, "message": ""}
    rest = {"kind": "train", "labels": {}, "state": "queued", "allowed_actions": [], "encoder": None, "run_folder": "r"}
    return {"id": job_id, **empty, **origin, **counts, **rest, "config": {}, "attempts": [], **fields}


class RecordedRequest(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    query: str


class FailingServer:
    """A minimal service. `faults` are returned to the next requests, one each, instead of a response."""

    def __init__(self) -> None:
        self.faults: list[int | str] = []
        self.requests: list[RecordedRequest] = []
        self.states = ["succeeded"]
        self.attempt = 1
        self.app = FastAPI()
        self.app.middleware("http")(self._respond_or_fail)
        self.app.post("/v1/jobs", status_code=202)(lambda: job("new"))
        self.app.get("/v1/jobs")(self._list)
        self.app.get("/v1/jobs/{job_id}")(self._get)
        self.app.post("/v1/jobs/{job_id}/{action}")(lambda job_id, action: job(job_id, message=action))
        self.app.get("/v1/jobs/{job_id}/events")(self._events)
        self.app.get("/v1/jobs/{job_id}/logs")(self._logs)
        self.file, self.parts, self.gaps = bytes(range(256)) * 1000, True, 3
        self.app.get("/v1/encoders/{name}/download")(self._file)

    async def _respond_or_fail(self, request: Request, call_next: Callable[[Request], Any]) -> Response:
        self.requests.append(
            RecordedRequest(request.method, request.url.path, dict(request.headers), request.url.query)
        )
        fault = self.faults.pop(0) if self.faults else None
        if fault == "break":
            request.scope["transport"].abort()
        elif isinstance(fault, int):
            problem = {"type": "about:blank", "title": "no", "detail": "not now", "code": "busy", "request_id": "r"}
            retryable = fault in (429, 503)
            headers = {"Retry-After": "7"} if retryable else {}
            return JSONResponse({**problem, "status": fault, "retryable": retryable}, fault, headers)
        elif fault == "proxy":
            return Response("<html>Bad gateway</html>", 404)
        return await call_next(request)

    def _list(self, limit: int, cursor: int = 0) -> dict[str, Any]:
        last = cursor + limit >= 7
        items = [job(f"job-{n}", future="field") for n in range(cursor, min(7, cursor + limit))]
        return {"items": items, "next_cursor": None if last else str(cursor + limit)}

    def _get(self, job_id: str) -> dict[str, Any]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return job(job_id, state=state, attempt=self.attempt)

    def _stream(self, request: Request, pieces: list[tuple[int, bytes]], after: int) -> StreamingResponse:
        """Stream two events and half of a third, then break the connection; complete the last two."""

        async def body() -> AsyncIterator[bytes]:
            remaining = [piece for number, piece in pieces if number > after]
            yield b": heartbeat\n\nretry: 2000\n\nevent: progress\ndata: {}\n\n"
            if len(remaining) > 2:
                yield remaining[0] + remaining[1] + remaining[2][: len(remaining[2]) // 2]
                await asyncio.sleep(0)
                request.scope["transport"].abort()
            yield b"".join(remaining) + b'event: end\ndata: {"state": "succeeded"}\n\n'

        return StreamingResponse(body(), media_type="text/event-stream")

    def _events(self, request: Request) -> StreamingResponse:
        event = {"at": AT, "type": "created", "actor": "key", "data": {"text": "\u2028"}}
        events = [(n, f"id: {n}\nevent: job\ndata: {json.dumps({'id': n, **event})}\n\n".encode()) for n in range(1, 9)]
        return self._stream(request, events, int(request.headers.get("Last-Event-ID", 0)))

    def _logs(self, request: Request, follow: bool = False) -> Response:
        if follow and len(self.states) == 2:  # the job failed in the meantime and is retried
            self.attempt = 2
        if not follow:
            return Response(LOG, media_type="text/plain")
        events = []
        for start in range(0, len(LOG), 50):
            text = json.dumps({"text": LOG[start : start + 50]}, ensure_ascii=False)
            events.append((start + 50, f"id: {start + 50}\r\nevent: log\r\ndata: {text}\r\n\r\n".encode()))
        return self._stream(request, events, int(request.headers.get("Last-Event-ID", 0)))

    def _file(self, request: Request) -> Response:
        """Break the first `gaps` responses in the middle of the requested bytes."""
        start = int(request.headers.get("range", "bytes=0-")[6:-1]) if self.parts else 0
        remaining, self.gaps = self.file[start:], self.gaps - 1
        headers = {"ETag": '"1"', "Content-Length": str(len(remaining))}

        async def body() -> AsyncIterator[bytes]:
            yield remaining[: len(remaining) // 2]
            if self.gaps >= 0:
                await asyncio.sleep(0.05)  # so that the first half is sent
                request.scope["transport"].abort()
            yield remaining[len(remaining) // 2 :]

        return StreamingResponse(body(), 206 if start else 200, headers)


@pytest.fixture
def server() -> FailingServer:
    return FailingServer()


@pytest.fixture
def url(server: FailingServer) -> Iterator[str]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["transport"] = getattr(getattr(send, "__self__", None), "transport", None)
        await server.app(scope, receive, send)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        runner = uvicorn.Server(uvicorn.Config(app, log_level="critical", http="h11"))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        runner.should_exit = runner.force_exit = True
        thread.join()


class ImmediateRetries(Patience):
    """Records the requested pauses and does not wait."""

    requested_s: ClassVar[list[float]] = []

    def pause(self, failures: int, requested_s: float = 0.0) -> float | None:
        self.requested_s.append(requested_s)
        return None if super().pause(failures, requested_s) is None else 0.0


QUICK = ImmediateRetries(tries=4)


class ClientCase(NamedTuple):
    client: Any
    resolve: Callable[[Any], Any]
    """Complete a call: return its value, or the list of the items that it yields."""


@pytest.fixture(params=["blocking", "async"])
def client_case(request: pytest.FixtureRequest, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClientCase]:
    """Return each client in turn; the tests must pass for both."""
    monkeypatch.setattr("service.client.jobs.POLL_INTERVAL_S", 0.0)
    QUICK.requested_s.clear()
    if request.param == "blocking":
        with Client(url, "amd_key", patience=QUICK) as client:
            yield ClientCase(client, lambda call: list(call) if isinstance(call, Iterator) else call)
        return

    async def complete(call: Any) -> Any:
        return [item async for item in call] if isinstance(call, AsyncIterator) else await call

    with asyncio.Runner() as runner:
        async_client = AsyncClient(url, "amd_key", patience=QUICK)
        yield ClientCase(async_client, lambda call: runner.run(complete(call)))
        runner.run(async_client.close())


REQUEST = JobRequest(kind="train", preset="demo-image-amd")


def test_a_rejected_or_lost_submission_is_retried_with_the_same_key(
    server: FailingServer, client_case: ClientCase
) -> None:
    server.faults = [503, "break", 429]
    assert client_case.resolve(client_case.client.jobs.submit(REQUEST)).id == "new"
    keys = {request.headers["idempotency-key"] for request in server.requests}
    assert (len(server.requests), len(keys)) == (4, 1)
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer amd_key"}
    client_case.resolve(client_case.client.jobs.submit(REQUEST))
    assert server.requests[-1].headers["idempotency-key"] not in keys


def test_retry_after_is_respected(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [429, 503]
    client_case.resolve(client_case.client.jobs.get("a"))
    assert QUICK.requested_s == [7.0, 7.0]


def test_exhausted_retries_raise_the_error_of_the_service(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [503] * 9
    with pytest.raises(ApiError) as rejected:
        client_case.resolve(client_case.client.jobs.get("a"))
    assert (rejected.value.problem.status, rejected.value.problem.code, len(server.requests)) == (503, "busy", 4)


def test_a_request_that_may_have_been_executed_is_not_repeated(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = ["break"]
    with pytest.raises(NoAnswer):
        client_case.resolve(client_case.client.jobs.retry("a"))
    assert len(server.requests) == 1
    server.faults = ["break"]
    assert (
        client_case.resolve(client_case.client.jobs.cancel("a")).message == "cancel"
    )  # cancelling twice has no further effect
    assert len(server.requests) == 3


def test_a_rate_limited_request_is_retried(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [429]
    assert client_case.resolve(client_case.client.jobs.retry("a")).message == "retry"


def test_a_client_error_is_not_retried(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [404]
    with pytest.raises(ApiError, match=r"not now \(busy\)"):
        client_case.resolve(client_case.client.jobs.get("a"))
    assert len(server.requests) == 1


def test_an_error_page_of_a_proxy_is_an_api_error(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = ["proxy"]
    with pytest.raises(ApiError) as rejected:
        client_case.resolve(client_case.client.jobs.get("a"))
    assert rejected.value.problem.code == "http_404"


def test_a_listing_reads_all_pages_and_ignores_unknown_fields(server: FailingServer, client_case: ClientCase) -> None:
    found = client_case.resolve(client_case.client.jobs.list(state="queued", labels={"team": "video"}, page=3))
    assert [view.id for view in found] == [f"job-{n}" for n in range(7)]
    assert "state=queued" in server.requests[0].query
    assert "label=team%3Dvideo" in server.requests[0].query
    assert len(server.requests) == 3


def test_an_interrupted_event_stream_neither_loses_nor_repeats_events(
    server: FailingServer, client_case: ClientCase
) -> None:
    events = client_case.resolve(client_case.client.jobs.events("a"))
    assert [event.id for event in events] == list(range(1, 9))
    resumed = [request.headers.get("last-event-id") for request in server.requests]
    assert resumed == [None, "2", "4", "6"]


def test_events_resume_after_a_known_id(client_case: ClientCase) -> None:
    assert [event.id for event in client_case.resolve(client_case.client.jobs.events("a", after=6))] == [7, 8]


def test_a_followed_log_is_complete(client_case: ClientCase) -> None:
    assert "".join(client_case.resolve(client_case.client.jobs.logs("a", follow=True))) == LOG
    assert "".join(client_case.resolve(client_case.client.jobs.logs("a"))) == LOG


def test_a_followed_log_continues_with_the_next_attempt(server: FailingServer, client_case: ClientCase) -> None:
    server.states = ["running", "retrying", "succeeded"]
    assert "".join(client_case.resolve(client_case.client.jobs.logs("a", follow=True))) == LOG * 2
    assert {request.query for request in server.requests if request.query} == {
        "follow=true&attempt=1",
        "follow=true&attempt=2",
    }


def test_the_log_of_an_unstarted_job_is_empty_and_an_attempt_can_be_selected(
    server: FailingServer, client_case: ClientCase
) -> None:
    server.attempt = 0
    assert client_case.resolve(client_case.client.jobs.logs("a", follow=True)) == []
    server.attempt = 2
    assert "".join(client_case.resolve(client_case.client.jobs.logs("a", follow=True, attempt=1))) == LOG
    assert server.requests[-1].query == "follow=true&attempt=1"


def test_a_rejected_stream_raises_the_error(server: FailingServer, client_case: ClientCase) -> None:
    server.faults = [503, 404]
    with pytest.raises(ApiError, match="not now"):
        client_case.resolve(client_case.client.jobs.events("a"))


def test_wait_returns_when_the_job_ends(server: FailingServer, client_case: ClientCase) -> None:
    server.states = ["queued", "running", "pausing", "failed"]
    assert client_case.resolve(client_case.client.jobs.wait("a")).state == "failed"
    server.states = ["running"]
    with pytest.raises(TimeoutError, match="a is still running"):
        client_case.resolve(client_case.client.jobs.wait("a", timeout_s=-1))


@pytest.mark.parametrize("parts", [True, False], ids=["in parts", "whole only"])
def test_an_interrupted_download_is_resumed(
    server: FailingServer, client_case: ClientCase, tmp_path: Path, parts: bool
) -> None:
    server.parts = parts
    target = tmp_path / "weights"
    assert client_case.resolve(client_case.client.encoders.download("a", target, "encoder.safetensors")) == target
    assert target.read_bytes() == server.file
    assert (len(server.requests), {request.headers.get("if-range") for request in server.requests[1:]}) == (4, {'"1"'})
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_failed_download_leaves_no_file(server: FailingServer, client_case: ClientCase, tmp_path: Path) -> None:
    server.faults = [404]
    with pytest.raises(ApiError):
        client_case.resolve(client_case.client.encoders.download("a", tmp_path / "weights"))
    assert list(tmp_path.iterdir()) == []


def test_the_error_contains_the_address_of_an_unreachable_service() -> None:
    unreachable = "http://127.0.0.1:1"
    with (
        Client(unreachable, patience=QUICK) as client,
        pytest.raises(NoAnswer, match=f"{unreachable}: the service does not"),
    ):
        client.jobs.get("a")


def test_pauses_grow_and_are_jittered() -> None:
    patience = Patience(tries=10, first_s=1.0, most_s=8.0)
    pauses = [[patience.pause(failures) or 0.0 for _ in range(20)] for failures in (1, 2, 3, 4, 9)]
    assert [max(drawn) <= most for drawn, most in zip(pauses, (1, 2, 4, 8, 8), strict=True)] == [True] * 5
    assert all(len(set(drawn)) > 1 for drawn in pauses)
    assert patience.pause(10) is None
    assert patience.pause(1, requested_s=1e6) is None


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n"))


@given(st.lists(st.tuples(st.integers(0, 99), TEXT), max_size=6), st.lists(st.integers(1, 9)))
def test_events_do_not_depend_on_chunk_boundaries(sent: list[tuple[int, str]], cuts: list[int]) -> None:
    stream = b"".join(f": hb\nid: {n}\nevent: log\ndata: {text}\n\n".encode() for n, text in sent)
    reader, received, start = EventReader(), [], 0
    for length in [*cuts, len(stream)]:
        received += reader.feed(stream[start : start + length])
        start += length
    assert received == [ServerEvent(str(n), "log", text) for n, text in sent]


def test_the_client_reads_service_and_key_from_the_environment(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("amd_from_file\n")
    monkeypatch.setenv("AMD_URL", url)
    monkeypatch.setenv("AMD_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.delenv("AMD_KEY", raising=False)
    with Client.from_environment() as client:
        assert client._http.headers["authorization"] == "Bearer amd_from_file"
        assert client.jobs.get("a").id == "a"
    monkeypatch.setenv("AMD_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(NoAnswer, match=r"AMD_KEY_FILE=.*none"):
        Client.from_environment()


def test_without_a_service_the_error_explains_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMD_URL", raising=False)
    monkeypatch.setenv("AMD_DATA_DIR", str(tmp_path))
    with pytest.raises(NoAnswer, match="amd up"):
        Client.from_environment()


def test_the_client_imports_neither_torch_nor_ray() -> None:
    code = "import sys, service.client; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
