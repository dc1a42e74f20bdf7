# Generated from service/client/_async/jobs.py by `python -m tests.support.blocking_client`; do not edit.
"""Job methods, available as `client.jobs`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from httpx_sse import ServerSentEvent

from service.client._sync.requests import POLL_INTERVAL_S, ApiMethods
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


class Jobs(ApiMethods):
    _resource = ("jobs",)

    def submit(self, request: JobRequest, key: str | None = None) -> JobView:
        """Submit a job. `key` is the Idempotency-Key; by default one is generated."""
        return self._request("POST", JobView, body=request, headers=idempotency(key))

    def get(self, job_id: str) -> JobDetail:
        return self._request("GET", JobDetail, job_id)

    def cancel(self, job_id: str, deadline_s: float | None = None) -> JobView:
        """Cancel a job after a final checkpoint, which must be saved within `deadline_s`."""
        body = CancelRequest(deadline_s=deadline_s)
        return self._request("POST", JobView, job_id, "cancel", body=body, repeatable=True)

    def pause(self, job_id: str) -> JobView:
        """Pause a job after a final checkpoint, from which `resume` continues."""
        return self._request("POST", JobView, job_id, "pause", repeatable=True)

    def resume(self, job_id: str) -> JobView:
        return self._request("POST", JobView, job_id, "resume")

    def retry(self, job_id: str) -> JobView:
        """Retry a failed or cancelled job from its newest checkpoint."""
        return self._request("POST", JobView, job_id, "retry")

    def clone(self, job_id: str, request: CloneRequest | None = None, key: str | None = None) -> JobView:
        """Submit a copy of a job with changes. `key` is the Idempotency-Key."""
        body = request or CloneRequest()
        return self._request("POST", JobView, job_id, "clone", body=body, headers=idempotency(key))

    def fork(self, job_id: str, request: ForkRequest, key: str | None = None) -> JobView:
        """Submit a copy of a job that starts from one of its checkpoints. `key` is the Idempotency-Key."""
        return self._request("POST", JobView, job_id, "fork", body=request, headers=idempotency(key))

    def delete(self, job_id: str) -> None:
        """Delete a job that has ended."""
        self._send("DELETE", job_id)

    def wait(self, job_id: str, timeout_s: float | None = None) -> JobDetail:
        """Wait until a job ends. Raises TimeoutError after the timeout."""
        until, interval = None if timeout_s is None else time.monotonic() + timeout_s, POLL_INTERVAL_S
        while True:
            job = self.get(job_id)
            if job.state in ENDED:
                return job
            if until is not None and time.monotonic() + interval > until:
                raise TimeoutError(f"{job_id} is still {job.state} after {timeout_s:g} s")
            time.sleep(interval)
            interval = min(MAX_POLL_INTERVAL_S, interval * 1.5)

    def logs(
        self,
        job_id: str,
        *,
        follow: bool = False,
        attempt: int | None = None,
        tail: int | None = None,
        rank: int | None = None,
    ) -> Iterator[str]:
        """Stream the log of a job in chunks. `tail` limits it to the last lines; `attempt` defaults to the newest.

        With `follow`, the stream continues until the attempt ends or, if `attempt` is omitted, until the job ends or is
        paused.
        `rank`: stream this rank's output across all attempts instead of an attempt's log. With `follow`, this stream
        continues until the current attempt ends.
        """
        if not follow:
            response = self._send("GET", job_id, "logs", query={"attempt": attempt, "tail": tail, "rank": rank})
            yield response.text
            return
        followed_attempt = 0
        while True:
            job = self.get(job_id)
            if job.attempt > followed_attempt:
                first, followed_attempt = followed_attempt == 0, attempt or job.attempt
                query = {"follow": "true", "attempt": followed_attempt, "tail": tail if first else None, "rank": rank}
                with closing(self._events(_log_chunk, job_id, "logs", query=query)) as chunks:
                    for chunk in chunks:
                        yield chunk
                if attempt is not None or rank is not None:
                    return
            elif job.state in (*ENDED, "paused"):
                return
            else:
                time.sleep(POLL_INTERVAL_S)

    def events(self, job_id: str, *, after: int = 0) -> Iterator[EventView]:
        """Stream the history of a job until the job ends. `after`: ID of the last event to skip."""
        return self._events(_job_event, job_id, "events", last_id=str(after) if after else None)

    def metrics(self, job_id: str, names: Sequence[str] = (), max_points: int | None = None) -> MetricsView:
        query = {"names": ",".join(names) or None, "max_points": max_points}
        return self._request("GET", MetricsView, job_id, "metrics", query=query)

    def report(self, job_id: str) -> str:
        """Get a report on a run or a sweep: one self-contained HTML file without scripts."""
        return (self._send("GET", job_id, "report")).text

    def trials(self, job_id: str) -> list[TrialView]:
        return self._request("GET", list[TrialView], job_id, "trials")

    def stop_trial(self, job_id: str, number: int) -> TrialView:
        """Stop a running trial of a sweep after a final checkpoint. Its scores are kept, and the sweep continues."""
        return self._request("POST", TrialView, job_id, "trials", str(number), "stop", repeatable=True)

    def checkpoints(self, job_id: str) -> list[CheckpointView]:
        return self._request("GET", list[CheckpointView], job_id, "checkpoints")

    def media(self, job_id: str) -> list[MediaStepView]:
        """List the pictures that a run writes while it trains, by step."""
        return self._request("GET", list[MediaStepView], job_id, "media")

    def picture(self, job_id: str, step: int, name: str) -> bytes:
        """Get a picture as a WebP file. `name` is one of the step's files that `media` lists."""
        return (self._send("GET", job_id, "media", str(step), name)).content

    def artifacts(self, job_id: str) -> ArtifactList:
        """List the files that a job has written: reports, metrics, test results and embeddings, but not checkpoints."""
        return self._request("GET", ArtifactList, job_id, "artifacts")

    def download(self, job_id: str, artifact: str, to: str | Path) -> Path:
        """Download one of the files that `artifacts` lists, by its path, to the path `to`, atomically.

        Resumes if the connection drops and the service supports byte ranges.
        """
        return self._download(Path(to), job_id, "artifacts", *artifact.split("/"))

    def neighbours(
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
        return self._request("POST", list[NeighbourView], job_id, "neighbours", **options)

    def list(  # the last method, since the class hides the builtin from here on
        self,
        *,
        kind: JobKind | None = None,
        state: State | None = None,
        labels: Mapping[str, str] | None = None,
        project: str | None = None,
        page: int = 200,
    ) -> Iterator[JobView]:
        """List matching jobs, newest first; pages are fetched as needed."""
        pairs = [f"{key}={value}" for key, value in (labels or {}).items()]
        query = {"kind": kind, "state": state, "label": pairs or None, "project": project, "limit": page}
        return self._pages(JobPage, query=query)


def _log_chunk(event: ServerSentEvent) -> str | None:
    return str(json.loads(event.data)["text"]) if event.event == "log" else None


def _job_event(event: ServerSentEvent) -> EventView | None:
    return parse(EventView, event.data) if event.event == "job" else None
