"""A service that rejects requests, breaks streams or responds unexpectedly, and clients that retry immediately."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from service.client import Patience

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
    """A minimal service. Each of the next requests receives one of the `faults` instead of a normal response."""

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
        """Stream two and a half events, then drop the connection. If at most two remain, stream them in full."""

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
        """Return the requested bytes, but drop the connection halfway through each of the first `gaps` responses."""
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
    """Completes a call and returns its value, or a list of the items that it yields."""
