"""/v1/jobs: parse, call one function of the room, answer with a view."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from amd.config import ConfigError
from amd.storage import remove
from amd.training.reporting.metrics import read_metrics
from amd.training.run_folder import run_folder
from service.auth.authentication import Principal, Reader, Submitter
from service.auth.uri_policy import UriPolicy
from service.db.models import Job
from service.jobs import logs, metrics, streams, views
from service.jobs.execution.protocol import JobFolder
from service.jobs.execution.reconciler import act, check_allowed
from service.jobs.kinds import JobKind, named, need, resolve, uris
from service.jobs.schemas import (
    DEFAULT_PROJECT,
    Action,
    CancelRequest,
    CheckpointView,
    JobDetail,
    JobPage,
    JobRequest,
    JobView,
    MetricsView,
    State,
    TrialView,
)
from service.jobs.store import JobFilter, JobStore, Stale, new_job_id
from service.settings import Settings
from service.web.errors import NotFound
from service.web.middleware import tagged

router = APIRouter(prefix="/jobs", tags=["jobs"])

EVENT = {"type": "object", "properties": {name: {"type": "string"} for name in ("id", "event", "data")}}
EVENT_STREAM = {"text/event-stream": {"schema": EVENT}}


def _store(request: Request) -> JobStore:
    store: JobStore = request.app.state.jobs
    return store


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _uris(request: Request) -> UriPolicy:
    policy: UriPolicy = request.app.state.uris
    return policy


Jobs = Annotated[JobStore, Depends(_store)]
Config = Annotated[Settings, Depends(_settings)]
Uris = Annotated[UriPolicy, Depends(_uris)]
JobId = Annotated[str, Path(min_length=1, max_length=100)]


def _visible(job_id: JobId, jobs: Jobs, caller: Reader) -> Job:
    """The job, where the caller may see it."""
    return jobs.get(job_id, caller.project)


Visible = Annotated[Job, Depends(_visible)]


def project_of(caller: Principal, wanted: str | None) -> str:
    """The project that a request is for. Raises Forbidden for one that is not the caller's."""
    return caller.own_project(wanted) or DEFAULT_PROJECT


def resolved(request: JobRequest, policy: UriPolicy, root: str) -> Any:
    """The request's complete config. Raises ConfigError, UriNotAllowed."""
    config = resolve(request.kind, request.preset, request.config, request.overrides)
    problems = [
        f"{field}={value}: the service keeps all runs below its own root; leave it out"
        for field in ("storage", "train.storage")
        if (value := _field(config, field)) not in (None, root)
    ]
    if (value := _field(config, "output")) is not None:
        problems.append(f"output={value}: a job writes below its own folder; leave it out")
    if (value := _field(config, "name")) is not None:
        problems.append(f"name={value}: a job's id is its run's name; leave it out, and name the job beside its config")
    if problems:
        raise ConfigError(problems)
    policy.check_all(uris(config))
    return config


def _field(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part, None)
    return config


@router.post("", status_code=202, summary="Submit a job")
def submit(
    body: JobRequest,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Uris,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> JobView:
    """Accept a job. It is queued from now on and not lost again, whatever dies.

    With an `Idempotency-Key`, the same request again answers with the same job.
    """
    project = project_of(caller, body.project)
    root = settings.root
    config = resolved(body, policy, root)
    needs, now, job_id = need(config), time.time(), new_job_id(body.kind)
    job = Job(
        id=job_id,
        project=project,
        kind=body.kind,
        name=body.name,
        labels=dict(body.labels),
        priority=body.priority,
        origin="api",
        created_by=caller.id,
        preset=body.preset,
        config=named(body.kind, config, job_id, root),
        max_retries=body.max_retries,
        time_limit_s=body.time_limit_s,
        workers=needs.workers,
        cpus=needs.cpus,
        device=needs.device,
        wanted="run",
        state="queued",
        message="",
        attempt=0,
        retries=0,
        not_before=now,
        created_at=now,
        changed_at=now,
    )
    if idempotency_key is None:
        jobs.add(job, caller.id)
    else:
        job, _ = jobs.add_once(job, caller.id, idempotency_key, body.model_dump_json().encode())
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return views.job_view(job, None, root)


@router.get("", summary="List jobs, newest first")
def list_jobs(
    caller: Reader,
    jobs: Jobs,
    settings: Config,
    kind: Annotated[list[JobKind] | None, Query()] = None,
    state: Annotated[list[State] | None, Query()] = None,
    label: Annotated[
        list[Annotated[str, Query(pattern=r"^[^=]+=.*$", max_length=320)]] | None,
        Query(description="`key=value`; several must all fit."),
    ] = None,
    origin: Literal["api", "external"] | None = None,
    project: Annotated[str | None, Query(max_length=63)] = None,
    cursor: Annotated[str | None, Query(max_length=300)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JobPage:
    mine = caller.own_project(project)
    labels = dict(pair.split("=", 1) for pair in label or [])
    page = jobs.list(JobFilter(mine, kind or (), state or (), labels, origin), cursor, limit)
    newest = jobs.newest_attempts(page.jobs)
    items = [views.job_view(job, newest.get(job.id), settings.root) for job in page.jobs]
    return JobPage(items=items, next_cursor=page.next_cursor)


@router.get("/{job_id}", summary="A job whole", responses={304: {"description": "As `If-None-Match` has it."}})
def get_job(
    job: Visible,
    jobs: Jobs,
    settings: Config,
    response: Response,
    if_none_match: Annotated[str | None, Header()] = None,
) -> JobDetail:
    return tagged(views.job_detail(job, jobs.attempts(job.id), settings.root), response, if_none_match)


@router.delete("/{job_id}", status_code=204, summary="Forget a job that has ended")
def delete_job(job_id: JobId, caller: Submitter, jobs: Jobs, settings: Config) -> None:
    """Its log, metrics, checkpoints and output go too; an encoder that it published stays."""
    job = _allowed(jobs, job_id, caller, "delete")
    remove(JobFolder(settings.root, job.id).url)
    remove(run_folder(settings.root, job.id))
    while True:
        try:
            jobs.delete(job)
            return
        except Stale:
            job = _allowed(jobs, job_id, caller, "delete")


def _allowed(jobs: JobStore, job_id: str, caller: Principal, action: Action) -> Job:
    job = jobs.get(job_id, caller.project)
    check_allowed(job, action)
    return job


@router.post("/{job_id}/cancel", status_code=202, summary="Stop a job, with a last checkpoint")
def cancel(
    job_id: JobId, caller: Submitter, jobs: Jobs, settings: Config, body: CancelRequest | None = None
) -> JobView:
    return _act(jobs, settings, job_id, caller, "cancel", body.deadline_s if body is not None else None)


def _acting(action: Action) -> Callable[..., JobView]:
    def do(job_id: JobId, caller: Submitter, jobs: Jobs, settings: Config) -> JobView:
        return _act(jobs, settings, job_id, caller, action)

    do.__name__ = f"{action}_job"
    return do


for _action, _summary in (
    ("pause", "Stop a job with a last checkpoint, until it is resumed"),
    ("resume", "Go on with a paused job"),
    ("retry", "Start a failed or cancelled job once more, from its newest checkpoint"),
):
    router.post(f"/{{job_id}}/{_action}", status_code=202, summary=_summary)(_acting(_action))  # type: ignore[arg-type]


def _act(
    jobs: JobStore,
    settings: Settings,
    job_id: str,
    caller: Principal,
    action: Action,
    deadline_s: float | None = None,
) -> JobView:
    job = act(jobs, job_id, caller.project, action, caller.id, deadline_s)
    return views.job_view(job, jobs.newest_attempts([job]).get(job.id), settings.root)


@router.get(
    "/{job_id}/logs",
    summary="What a job printed",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}, **EVENT_STREAM}}},
)
def job_logs(
    job: Visible,
    jobs: Jobs,
    settings: Config,
    follow: bool = False,
    tail: Annotated[int | None, Query(ge=0, le=100_000, description="The last lines only.")] = None,
    attempt: Annotated[int | None, Query(ge=1, description="None: the newest.")] = None,
    offset: Annotated[int, Query(ge=0, description="Bytes to leave out.")] = 0,
    last_event_id: Annotated[int, Header(ge=0)] = 0,
) -> Response:
    """As text; with `follow` as server-sent events (`log`, then `end`), whose ids are the offsets to go on from."""
    number = attempt or max(job.attempt, 1)
    if number > max(job.attempt, 1):
        raise NotFound(f"{job.id} has begun {job.attempt} attempts, not {number}")
    folder = JobFolder(settings.root, job.id)
    start = last_event_id or offset
    if tail is not None and not last_event_id:
        start = logs.tail_offset(folder, number, tail)
    if not follow:
        return StreamingResponse(logs.pieces(folder, number, start), media_type="text/plain; charset=utf-8")
    return _stream(streams.job_log(jobs, folder, job, number, start))


@router.get("/{job_id}/metrics", summary="A job's metrics as series")
def job_metrics(
    job: Visible,
    settings: Config,
    names: Annotated[str | None, Query(max_length=2000, description="With commas; none: all.")] = None,
    max_points: Annotated[int, Query(ge=2, le=10_000)] = 500,
) -> MetricsView:
    wanted = [name.strip() for name in names.split(",")] if names else []
    return metrics.series(read_metrics(run_folder(settings.root, job.id)), wanted, max_points)


@router.get(
    "/{job_id}/events",
    summary="A job's history and what happens to it, as server-sent events",
    response_class=StreamingResponse,
    responses={200: {"content": EVENT_STREAM}},
)
def job_events(job: Visible, jobs: Jobs, request: Request, last_event_id: Annotated[int, Header(ge=0)] = 0) -> Response:
    """`job` for each change (its id to go on from by `Last-Event-ID`), `progress` between, `end` at the end."""
    return _stream(streams.job_events(jobs, request.app.state.hub, job, last_event_id))


@router.get("/{job_id}/trials", summary="The trials of a sweep")
def job_trials(job: Visible, settings: Config) -> list[TrialView]:
    return list(views.trials(run_folder(settings.root, job.id)))


@router.get("/{job_id}/checkpoints", summary="The checkpoints that a job can go on from")
def job_checkpoints(job: Visible, settings: Config) -> list[CheckpointView]:
    return list(views.checkpoints(run_folder(settings.root, job.id)))


def _stream(events: Any) -> StreamingResponse:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
