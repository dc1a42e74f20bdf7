"""Jobs as a client asks for them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter

from service.client.deployments import input_of
from service.client.methods import Awaiting, Blocking, given, many, many_later, one, one_later, pages, view
from service.client.transport import (
    Call,
    Emit,
    Patience,
    Script,
    ServerEvent,
    Sleep,
    Steps,
    exchange,
    listen,
    nothing,
    once,
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

LOOK_S, LOOK_MOST_S = 0.5, 3.0  # between two looks of `wait`


def job_submit(request: JobRequest, key: str | None = None) -> Script[JobView]:
    """Accept a job. `key`: the Idempotency-Key; one is made for this call where none is given."""
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
    """All jobs that fit, newest first; pages are fetched as they are needed."""
    pairs = [f"{key}={value}" for key, value in (labels or {}).items()]
    query = given(kind=kind, state=state, label=pairs or None, project=project, limit=page)
    return pages("/v1/jobs", JobPage, query)


def _act(job_id: str, action: str, body: Mapping[str, Any] | None = None, changes: bool = False) -> Script[JobView]:
    path = f"/v1/jobs/{quote(job_id, safe='')}/{action}"
    return once(Call("POST", path, view(JobView), body=body, changes=changes))


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
        return once(Call("GET", path, lambda answer: answer.text, given(attempt=attempt, tail=tail)))

    def steps(patience: Patience) -> Steps[None]:
        told = 0
        while True:
            job = yield from exchange(_get_job(job_id), patience)
            if job.attempt > told:
                first, told = told == 0, attempt or job.attempt
                query = given(follow="true", attempt=told, tail=tail if first else None)
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
    query = given(names=",".join(names) or None, max_points=max_points)
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
    """What lies nearest among the embeddings of a job of kind embed, to one of these.

    `file`: a path of this machine, bytes, or a text with a scheme; a deployment of the same encoder embeds it.
    """
    asked = given(record=record, location=location, vector=vector if vector is None else list(vector))
    body = {**asked, **({} if file is None else {"input": input_of(file)}), "k": k}
    path = f"/v1/jobs/{quote(job_id, safe='')}/neighbours"
    return once(Call("POST", path, view(list[NeighbourView]), body=body, changes=False))


class Jobs(Blocking):
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


class AsyncJobs(Awaiting):
    submit = one_later(job_submit)
    get = one_later(job_get)
    list = many_later(job_list)
    cancel = one_later(job_cancel)
    pause = one_later(job_pause)
    resume = one_later(job_resume)
    retry = one_later(job_retry)
    delete = one_later(job_delete)
    wait = one_later(job_wait)
    logs = many_later(job_logs)
    events = many_later(job_events)
    metrics = one_later(job_metrics)
    trials = one_later(job_trials)
    checkpoints = one_later(job_checkpoints)
    neighbours = one_later(job_neighbours)
