"""Job methods, available as `client.jobs`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from httpx_sse import ServerSentEvent

from service.client._async.requests import POLL_INTERVAL_S, AsyncApiMethods
from service.client.messages import idempotency, input_item, parse, present
from service.jobs.details.schemas import ArtifactList, CloneRequest, ForkRequest, MediaStepView
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
)
from service.serving.requests import DEADLINE_S
from service.serving.schemas import NeighbourView

MAX_POLL_INTERVAL_S = 3.0  # upper bound for the growing polling interval of `wait`


class AsyncJobs(AsyncApiMethods):
    _resource = ("jobs",)

    async def submit(self, request: JobRequest, key: str | None = None) -> JobView:
        """Submit a job. `key` is the Idempotency-Key; by default one is generated."""
        return await self._request("POST", JobView, body=request, headers=idempotency(key))

    async def get(self, job_id: str) -> JobDetail:
        return await self._request("GET", JobDetail, job_id)

    async def cancel(self, job_id: str, deadline_s: float | None = None) -> JobView:
        """Cancel a job after a final checkpoint, which must be saved within `deadline_s`."""
        body = CancelRequest(deadline_s=deadline_s)
        return await self._request("POST", JobView, job_id, "cancel", body=body, repeatable=True)

    async def pause(self, job_id: str) -> JobView:
        """Pause a job after a final checkpoint, from which `resume` continues."""
        return await self._request("POST", JobView, job_id, "pause", repeatable=True)

    async def resume(self, job_id: str) -> JobView:
        return await self._request("POST", JobView, job_id, "resume")

    async def retry(self, job_id: str) -> JobView:
        """Retry a failed or cancelled job from its newest checkpoint."""
        return await self._request("POST", JobView, job_id, "retry")

    async def clone(self, job_id: str, request: CloneRequest | None = None, key: str | None = None) -> JobView:
        """Submit a copy of a job with changes. `key` is the Idempotency-Key."""
        body = request or CloneRequest()
        return await self._request("POST", JobView, job_id, "clone", body=body, headers=idempotency(key))

    async def fork(self, job_id: str, request: ForkRequest, key: str | None = None) -> JobView:
        """Submit a copy of a job that starts from one of its checkpoints. `key` is the Idempotency-Key."""
        return await self._request("POST", JobView, job_id, "fork", body=request, headers=idempotency(key))

    async def delete(self, job_id: str) -> None:
        """Delete a job that has ended."""
        await self._send("DELETE", job_id)

    async def wait(self, job_id: str, timeout_s: float | None = None) -> JobDetail:
        """Wait until a job ends. Raises TimeoutError after the timeout."""
        until, interval = None if timeout_s is None else time.monotonic() + timeout_s, POLL_INTERVAL_S
        while True:
            job = await self.get(job_id)
            if job.state in ENDED:
                return job
            if until is not None and time.monotonic() + interval > until:
                raise TimeoutError(f"{job_id} is still {job.state} after {timeout_s:g} s")
            await asyncio.sleep(interval)
            interval = min(MAX_POLL_INTERVAL_S, interval * 1.5)

    async def logs(
        self,
        job_id: str,
        *,
        follow: bool = False,
        attempt: int | None = None,
        tail: int | None = None,
        rank: int | None = None,
    ) -> AsyncIterator[str]:
        """Stream the log of a job in chunks. `tail` limits it to the last lines; `attempt` defaults to the newest.

        With `follow`, the stream continues until the attempt ends or, if `attempt` is omitted, until the job ends or is
        paused.
        `rank`: stream this rank's output across all attempts instead of an attempt's log. With `follow`, this stream
        continues until the current attempt ends.
        """
        if not follow:
            response = await self._send("GET", job_id, "logs", query={"attempt": attempt, "tail": tail, "rank": rank})
            yield response.text
            return
        followed_attempt = 0
        while True:
            job = await self.get(job_id)
            if job.attempt > followed_attempt:
                first, followed_attempt = followed_attempt == 0, attempt or job.attempt
                query = {"follow": "true", "attempt": followed_attempt, "tail": tail if first else None, "rank": rank}
                async with aclosing(self._events(_log_chunk, job_id, "logs", query=query)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                if attempt is not None or rank is not None:
                    return
            elif job.state in (*ENDED, "paused"):
                return
            else:
                await asyncio.sleep(POLL_INTERVAL_S)

    def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[EventView]:
        """Stream the history of a job until the job ends. `after`: ID of the last event to skip."""
        return self._events(_job_event, job_id, "events", last_id=str(after) if after else None)

    async def metrics(self, job_id: str, names: Sequence[str] = (), max_points: int | None = None) -> MetricsView:
        query = {"names": ",".join(names) or None, "max_points": max_points}
        return await self._request("GET", MetricsView, job_id, "metrics", query=query)

    async def report(self, job_id: str) -> str:
        """Get a report on a run or a sweep: one self-contained HTML file without scripts."""
        return (await self._send("GET", job_id, "report")).text

    async def trials(self, job_id: str) -> list[TrialView]:
        return await self._request("GET", list[TrialView], job_id, "trials")

    async def stop_trial(self, job_id: str, number: int) -> TrialView:
        """Stop a running trial of a sweep after a final checkpoint. Its scores are kept, and the sweep continues."""
        return await self._request("POST", TrialView, job_id, "trials", str(number), "stop", repeatable=True)

    async def checkpoints(self, job_id: str) -> list[CheckpointView]:
        return await self._request("GET", list[CheckpointView], job_id, "checkpoints")

    async def media(self, job_id: str) -> list[MediaStepView]:
        """List the pictures that a run writes while it trains, by step."""
        return await self._request("GET", list[MediaStepView], job_id, "media")

    async def picture(self, job_id: str, step: int, name: str) -> bytes:
        """Get a picture as a WebP file. `name` is one of the step's files that `media` lists."""
        return (await self._send("GET", job_id, "media", str(step), name)).content

    async def artifacts(self, job_id: str) -> ArtifactList:
        """List the files that a job has written: reports, metrics, test results and embeddings, but not checkpoints."""
        return await self._request("GET", ArtifactList, job_id, "artifacts")

    async def download(self, job_id: str, artifact: str, to: str | Path) -> Path:
        """Download one of the files that `artifacts` lists, by its path, to the path `to`, atomically.

        Resumes if the connection drops and the service supports byte ranges.
        """
        return await self._download(Path(to), job_id, "artifacts", *artifact.split("/"))

    async def neighbours(
        self,
        job_id: str,
        *,
        record: int | None = None,
        location: str | None = None,
        vector: Sequence[float] | None = None,
        file: str | Path | bytes | None = None,
        k: int = 10,
    ) -> list[NeighbourView]:
        """Find the nearest neighbours of one query in the embeddings of an embed job.

        `file` is a local path, bytes or a URI; a deployment of the same encoder must be available to embed it.
        """
        query: dict[str, Any] = {
            "record": record,
            "location": location,
            "vector": None if vector is None else list(vector),
            "input": None if file is None else input_item(file),
        }
        options = {"body": {**present(query), "k": k}, "repeatable": True, "deadline_s": DEADLINE_S}
        return await self._request("POST", list[NeighbourView], job_id, "neighbours", **options)

    def list(  # the last method, since the class hides the builtin from here on
        self,
        *,
        kind: JobKind | None = None,
        state: State | None = None,
        labels: Mapping[str, str] | None = None,
        project: str | None = None,
        page: int = 200,
    ) -> AsyncIterator[JobView]:
        """List matching jobs, newest first; pages are fetched as needed."""
        pairs = [f"{key}={value}" for key, value in (labels or {}).items()]
        query = {"kind": kind, "state": state, "label": pairs or None, "project": project, "limit": page}
        return self._pages(JobPage, query=query)


def _log_chunk(event: ServerSentEvent) -> str | None:
    return str(json.loads(event.data)["text"]) if event.event == "log" else None


def _job_event(event: ServerSentEvent) -> EventView | None:
    return parse(EventView, event.data) if event.event == "job" else None
