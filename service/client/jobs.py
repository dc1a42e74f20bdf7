"""Client calls for jobs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter

from service.client.deployments import input_item
from service.client.methods import (
    POLL_INTERVAL_S,
    AsyncMethods,
    BlockingMethods,
    async_many,
    async_one,
    many,
    one,
    pages,
    present,
    view,
)
from service.client.transport import (
    Call,
    Emit,
    Patience,
    Script,
    ServerEvent,
    Sleep,
    Steps,
    exchange,
    ignore_body,
    once,
    stream_events,
)
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
from service.serving.schemas import NeighbourView

MAX_POLL_INTERVAL_S = 3.0  # upper bound of the polling interval of `wait`, which grows


def job_submit(request: JobRequest, key: str | None = None) -> Script[JobView]:
    """Submit a job. `key` is the Idempotency-Key; by default one is generated."""
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    body = request.model_dump(mode="json", exclude_unset=True)
    return once(Call("POST", "/v1/jobs", view(JobView), body=body, headers=headers))


def job_get(job_id: str) -> Script[JobDetail]:
    return once(_get_job(job_id))


def _get_job(job_id: str) -> Call[JobDetail]:
    return Call("GET", f"/v1/jobs/{quote(job_id, safe='')}", view(JobDetail))


def job_list(
    *,
    kind: JobKind | None = None,
    state: State | None = None,
    labels: Mapping[str, str] | None = None,
    project: str | None = None,
    page: int = 200,
) -> Script[JobView]:
    """List matching jobs, newest first; pages are fetched as needed."""
    pairs = [f"{key}={value}" for key, value in (labels or {}).items()]
    query = present(kind=kind, state=state, label=pairs or None, project=project, limit=page)
    return pages("/v1/jobs", JobPage, query)


def _action(job_id: str, action: str, body: Mapping[str, Any] | None = None, changes: bool = False) -> Script[JobView]:
    path = f"/v1/jobs/{quote(job_id, safe='')}/{action}"
    return once(Call("POST", path, view(JobView), body=body, changes=changes))


def job_cancel(job_id: str, deadline_s: float | None = None) -> Script[JobView]:
    """Cancel a job after a final checkpoint, which must be saved within `deadline_s`."""
    return _action(job_id, "cancel", CancelRequest(deadline_s=deadline_s).model_dump(mode="json", exclude_none=True))


def job_pause(job_id: str) -> Script[JobView]:
    """Pause a job after a final checkpoint, from which `resume` continues."""
    return _action(job_id, "pause")


def job_resume(job_id: str) -> Script[JobView]:
    return _action(job_id, "resume", changes=True)


def job_retry(job_id: str) -> Script[JobView]:
    """Retry an ended job from its newest checkpoint."""
    return _action(job_id, "retry", changes=True)


def job_delete(job_id: str) -> Script[None]:
    """Delete an ended job."""
    return once(Call("DELETE", f"/v1/jobs/{quote(job_id, safe='')}", ignore_body))


def job_wait(job_id: str, timeout_s: float | None = None) -> Script[JobDetail]:
    """Wait until a job ends. Raises TimeoutError after the timeout."""

    def steps(patience: Patience) -> Steps[None]:
        until, interval = None if timeout_s is None else time.monotonic() + timeout_s, POLL_INTERVAL_S
        while True:
            job = yield from exchange(_get_job(job_id), patience)
            if job.state in ENDED:
                yield Emit(job)
                return
            if until is not None and time.monotonic() + interval > until:
                raise TimeoutError(f"{job_id} is still {job.state} after {timeout_s:g} s")
            yield Sleep(interval)
            interval = min(MAX_POLL_INTERVAL_S, interval * 1.5)

    return Script(steps)


def job_logs(job_id: str, *, follow: bool = False, attempt: int | None = None, tail: int | None = None) -> Script[str]:
    """Stream the log of a job in chunks. `tail` limits it to the last lines; `attempt` defaults to the newest.

    With `follow`, the stream continues until the attempt ends; without `attempt`, until the job ends or is paused.
    """
    path = f"/v1/jobs/{quote(job_id, safe='')}/logs"
    if not follow:
        return once(Call("GET", path, lambda response: response.text, present(attempt=attempt, tail=tail)))

    def steps(patience: Patience) -> Steps[None]:
        followed_attempt = 0
        while True:
            job = yield from exchange(_get_job(job_id), patience)
            if job.attempt > followed_attempt:
                first, followed_attempt = followed_attempt == 0, attempt or job.attempt
                query = present(follow="true", attempt=followed_attempt, tail=tail if first else None)
                yield from stream_events(path, query, _log_chunk, patience)
                if attempt is not None:
                    return
            elif job.state in (*ENDED, "paused"):
                return
            else:
                yield Sleep(POLL_INTERVAL_S)

    return Script(steps)


def _log_chunk(event: ServerEvent) -> str | None:
    return str(json.loads(event.data)["text"]) if event.name == "log" else None


def job_events(job_id: str, *, after: int = 0) -> Script[EventView]:
    """Stream the history of a job until it ends. `after` skips events up to this id."""
    path = f"/v1/jobs/{quote(job_id, safe='')}/events"

    def steps(patience: Patience) -> Steps[None]:
        yield from stream_events(path, {}, _job_event, patience, str(after) if after else None)

    return Script(steps)


_EVENT: TypeAdapter[EventView] = TypeAdapter(EventView)


def _job_event(event: ServerEvent) -> EventView | None:
    return _EVENT.validate_json(event.data, extra="ignore") if event.name == "job" else None


def job_metrics(job_id: str, names: Sequence[str] = (), max_points: int | None = None) -> Script[MetricsView]:
    query = present(names=",".join(names) or None, max_points=max_points)
    return once(Call("GET", f"/v1/jobs/{quote(job_id, safe='')}/metrics", view(MetricsView), query))


def job_trials(job_id: str) -> Script[list[TrialView]]:
    return once(Call("GET", f"/v1/jobs/{quote(job_id, safe='')}/trials", view(list[TrialView])))


def job_checkpoints(job_id: str) -> Script[list[CheckpointView]]:
    return once(Call("GET", f"/v1/jobs/{quote(job_id, safe='')}/checkpoints", view(list[CheckpointView])))


def job_neighbours(
    job_id: str,
    *,
    record: int | None = None,
    location: str | None = None,
    vector: Sequence[float] | None = None,
    file: str | Path | bytes | None = None,
    k: int = 10,
) -> Script[list[NeighbourView]]:
    """Find the nearest neighbours of one query in the embeddings of an embed job.

    `file` is a local path, bytes or a URI; a deployment of the same encoder must be available to embed it.
    """
    query = present(record=record, location=location, vector=vector if vector is None else list(vector))
    body = {**query, **({} if file is None else {"input": input_item(file)}), "k": k}
    path = f"/v1/jobs/{quote(job_id, safe='')}/neighbours"
    return once(Call("POST", path, view(list[NeighbourView]), body=body, changes=False))


class Jobs(BlockingMethods):
    submit = one(job_submit)
    get = one(job_get)
    list = many(job_list)
    cancel = one(job_cancel)
    pause = one(job_pause)
    resume = one(job_resume)
    retry = one(job_retry)
    delete = one(job_delete)
    wait = one(job_wait)
    logs = many(job_logs)
    events = many(job_events)
    metrics = one(job_metrics)
    trials = one(job_trials)
    checkpoints = one(job_checkpoints)
    neighbours = one(job_neighbours)


class AsyncJobs(AsyncMethods):
    submit = async_one(job_submit)
    get = async_one(job_get)
    list = async_many(job_list)
    cancel = async_one(job_cancel)
    pause = async_one(job_pause)
    resume = async_one(job_resume)
    retry = async_one(job_retry)
    delete = async_one(job_delete)
    wait = async_one(job_wait)
    logs = async_many(job_logs)
    events = async_many(job_events)
    metrics = async_one(job_metrics)
    trials = async_one(job_trials)
    checkpoints = async_one(job_checkpoints)
    neighbours = async_one(job_neighbours)
