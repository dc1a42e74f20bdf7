"""Routes under /v1/jobs. Handlers parse the request, call one function of the package and return a view."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from amd.config import ConfigError, ImportConfig, LocationError
from amd.training.run_folder import run_folder
from service.auth.authentication import Principal, Reader, Submitter
from service.auth.isolation import LocationPolicy
from service.auth.stream_limits import LimitedStream, StreamLimits
from service.db.models import Job
from service.jobs import streams, views
from service.jobs.actions import act, check_allowed
from service.jobs.config_bounds import MAX_WORKERS, check_bounds
from service.jobs.execution.log_sources import open_log
from service.jobs.execution.protocol import JobFolder
from service.jobs.kinds import JobKind, named, resolve, resources_of, uris_in
from service.jobs.location_checks import check_files_exist, check_locations
from service.jobs.metrics import MetricsCache
from service.jobs.schemas import (
    Action,
    CancelRequest,
    CheckpointView,
    JobDetail,
    JobFacets,
    JobPage,
    JobRequest,
    JobView,
    MetricsView,
    State,
    TrialView,
)
from service.jobs.store import JobFilter, JobStore, new_job_id
from service.projects.store import ProjectStore
from service.settings import Settings
from service.web.bounded_calls import BoundedCalls, with_progress
from service.web.errors import UriNotAllowed
from service.web.middleware import tagged
from service.web.parameters import (
    CURSOR,
    MAX_NUMBER,
    IdempotencyKey,
    IfNoneMatch,
    LastEventId,
    PageSize,
    ProjectFilter,
    Timestamp,
)
from service.web.schemas import DEFAULT_PROJECT

router = APIRouter(prefix="/jobs", tags=["jobs"])

EVENT = {"type": "object", "properties": {name: {"type": "string"} for name in ("id", "event", "data")}}
EVENT_STREAM = {"text/event-stream": {"schema": EVENT}}


async def _store(request: Request) -> JobStore:
    store: JobStore = request.app.state.jobs
    return store


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _locations(request: Request) -> LocationPolicy:
    policy: LocationPolicy = request.app.state.locations
    return policy


async def _stream_limits(request: Request) -> StreamLimits:
    limits: StreamLimits = request.app.state.stream_limits
    return limits


async def _storage_calls(request: Request) -> BoundedCalls:
    calls: BoundedCalls = request.app.state.storage_calls
    return calls


async def _metrics(request: Request) -> MetricsCache:
    cache: MetricsCache = request.app.state.metrics
    return cache


Jobs = Annotated[JobStore, Depends(_store)]
Config = Annotated[Settings, Depends(_settings)]
Locations = Annotated[LocationPolicy, Depends(_locations)]
StreamLimitsDep = Annotated[StreamLimits, Depends(_stream_limits)]
StorageCalls = Annotated[BoundedCalls, Depends(_storage_calls)]
"""Calls to the storage root. A handler that needs the storage root makes all of them through it."""
Metrics = Annotated[MetricsCache, Depends(_metrics)]
JobId = Annotated[str, Path(min_length=1, max_length=100, description="Job ID.")]


def _visible(job_id: JobId, jobs: Jobs, caller: Reader) -> Job:
    """Return the job. Raises NotFound if it does not exist or is not visible to the caller."""
    return jobs.get(job_id, caller.project)


def _recorded(job_id: JobId, jobs: Jobs, caller: Reader) -> Job:
    """Like `_visible`, but includes deleted jobs, whose history is kept."""
    return jobs.get(job_id, caller.project, deleted=True)


Visible = Annotated[Job, Depends(_visible)]
Recorded = Annotated[Job, Depends(_recorded)]


def project_of(caller: Principal, requested: str | None) -> str:
    """Return the project for a request. Raises Forbidden for a project that the caller's key does not cover."""
    return caller.own_project(requested) or DEFAULT_PROJECT


def resolved(request: JobRequest, policy: LocationPolicy, settings: Settings, project: str) -> Any:
    """Return the complete config for a request. Raises ConfigError, UriNotAllowed, or NotFound for an encoder or run.

    A job may use only its own project's runs and encoders, even if the submitter's key covers all projects, because
    every member of the project can read the job's output.
    """
    try:
        config = resolve(request.kind, request.preset, request.config, request.overrides)
    except LocationError as error:
        raise UriNotAllowed(str(error), field=error.field) from None
    if (name := getattr(config, "name", None)) is not None:
        remedy = "omit the field, and name the job instead: `--name` with `--submit`, or the request's `name`"
        raise ConfigError([f"name={name}: the run is named after the job's ID; {remedy}"])
    check_locations(config, partial(policy.check, project=project), settings.root)
    if settings.single_machine:
        check_files_exist(config)
    if isinstance(config, ImportConfig):
        policy.check_new_encoder(config.id, project)
    check_bounds(config, settings.project_max_workers)
    return config


@router.post("", status_code=202, summary="Submit a job")
def submit(
    body: JobRequest,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """Submit a job. Once accepted, it is stored durably and survives service restarts.

    Repeating a request with the same `Idempotency-Key` returns the same job.
    """
    project = project_of(caller, body.project)
    ProjectStore(jobs.engine).check_priority(project, body.priority)
    root = settings.root
    config = resolved(body, policy, settings, project)
    needs, now, job_id = resources_of(config), time.time(), new_job_id(body.kind)
    job = Job(
        id=job_id,
        project=project,
        kind=body.kind,
        name=body.name,
        labels=dict(body.labels),
        priority=body.priority,
        origin="api",
        created_by=caller.id,
        preset=body.source_preset,
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
    kind: Annotated[list[JobKind] | None, Query(description="Kinds to list. Default: all kinds.")] = None,
    state: Annotated[list[State] | None, Query(description="States to list. Default: all states.")] = None,
    label: Annotated[
        list[Annotated[str, Query(pattern=r"^[^=]+=.*$", max_length=320)]] | None,
        Query(description="Labels to filter by, as `key=value`; a job must match all of them."),
    ] = None,
    origin: Annotated[
        Literal["api", "external"] | None,
        Query(description="Origin to list: `api`, or `external` for jobs started outside the service. Default: both."),
    ] = None,
    q: Annotated[
        str, Query(max_length=200, description="Text to search for in the ID, name and preset (case-insensitive).")
    ] = "",
    since: Annotated[Timestamp | None, Query(description="Earliest creation time.")] = None,
    until: Annotated[Timestamp | None, Query(description="Latest creation time, exclusive.")] = None,
    facets: Annotated[bool, Query(description="Whether to count the matching jobs by state and kind.")] = False,
    project: ProjectFilter = None,
    cursor: Annotated[str | None, Query(max_length=300, description=CURSOR)] = None,
    limit: PageSize = 50,
) -> JobPage:
    labels = dict(pair.split("=", 1) for pair in label or [])
    bounds = (since.timestamp() if since else None, until.timestamp() if until else None)
    where = JobFilter(caller.own_project(project), kind or (), state or (), labels, origin, q.strip(), *bounds)
    page = jobs.list(where, cursor, limit)
    newest, counts = jobs.newest_attempts(page.jobs), JobFacets(**jobs.facets(where)) if facets else None
    items = [views.job_view(job, newest.get(job.id), settings.root) for job in page.jobs]
    return JobPage(items=items, next_cursor=page.next_cursor, facets=counts)


@router.get(
    "/{job_id}",
    summary="Get a job with its config and attempts",
    responses={304: {"description": "Unchanged since `If-None-Match`."}},
)
def get_job(
    job: Visible, jobs: Jobs, settings: Config, response: Response, if_none_match: IfNoneMatch = None
) -> JobDetail:
    return tagged(views.job_detail(job, jobs.attempts(job.id), settings.root), response, if_none_match)


@router.delete("/{job_id}", status_code=204, summary="Delete a job that has ended")
def delete_job(job_id: JobId, caller: Submitter, jobs: Jobs) -> None:
    """Delete a job with its log, metrics, checkpoints, output and, for a sweep, its trials. Its encoders are kept.

    The job disappears immediately, and its files are removed shortly afterwards. Its history, which shows who deleted
    it, is kept: `GET /v1/jobs?state=deleted` lists deleted jobs.
    """
    act(jobs, job_id, caller.project, "delete", caller.id)


@router.post("/{job_id}/cancel", status_code=202, summary="Cancel a job after a final checkpoint")
def cancel(
    job_id: JobId, caller: Submitter, jobs: Jobs, settings: Config, body: CancelRequest | None = None
) -> JobView:
    return _act(jobs, settings, job_id, caller, "cancel", body.deadline_s if body is not None else None)


def _action_route(action: Action) -> Callable[..., JobView]:
    def route(job_id: JobId, caller: Submitter, jobs: Jobs, settings: Config) -> JobView:
        return _act(jobs, settings, job_id, caller, action)

    route.__name__ = f"{action}_job"
    return route


for _action, _summary in (
    ("pause", "Pause a job after a final checkpoint"),
    ("resume", "Resume a paused job"),
):
    router.post(f"/{{job_id}}/{_action}", status_code=202, summary=_summary)(_action_route(_action))  # type: ignore[arg-type]


@router.post("/{job_id}/retry", status_code=202, summary="Restart a failed or cancelled job from its newest checkpoint")
def retry_job(job_id: JobId, caller: Submitter, jobs: Jobs, settings: Config, policy: Locations) -> JobView:
    # Ended jobs do not protect the encoders that they name, so another project may have published one with the same id.
    job = jobs.get(job_id, caller.project)
    check_allowed(job, "retry")
    policy.check_all(uris_in(job.kind, job.config), job.project)
    return _act(jobs, settings, job_id, caller, "retry")


def _act(
    jobs: JobStore, settings: Settings, job_id: str, caller: Principal, action: Action, deadline_s: float | None = None
) -> JobView:
    job = act(jobs, job_id, caller.project, action, caller.id, deadline_s)
    return views.job_view(job, jobs.newest_attempts([job]).get(job.id), settings.root)


@router.get(
    "/{job_id}/logs",
    summary="Get a job's log",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}, **EVENT_STREAM}}},
)
async def job_logs(
    job: Visible,
    caller: Reader,
    request: Request,
    limits: StreamLimitsDep,
    jobs: Jobs,
    settings: Config,
    follow: Annotated[bool, Query(description="Stream new output until the attempt ends.")] = False,
    tail: Annotated[
        int | None,
        Query(ge=0, le=100_000, description="Number of lines to return from the end of the log. Default: all lines."),
    ] = None,
    attempt: Annotated[
        int | None,
        Query(ge=1, le=MAX_NUMBER, description="Attempt number, starting at 1. Default: the newest attempt."),
    ] = None,
    rank: Annotated[
        int | None,
        Query(
            ge=0,
            lt=MAX_WORKERS,
            description="Rank whose output to return, across all attempts. Default: the attempt's log.",
        ),
    ] = None,
    offset: Annotated[
        int, Query(ge=0, le=MAX_NUMBER, description="Number of bytes to skip from the start of the log.")
    ] = 0,
    last_event_id: LastEventId = 0,
) -> Response:
    """Return the log as text or, with `follow`, as server-sent events (`log`, then `end`).

    For a run that `ray job submit` started outside the service, the log is the output stored by Ray.

    The ID of each event is the offset from which a client can resume. A stream ends when its API key becomes invalid
    and, with a `reconnect` event, after the maximum lifetime; the client then resumes with `Last-Event-ID`.
    """
    calls, source = await open_log(request.app.state, job, attempt, rank, wait=follow)
    start = last_event_id or offset
    if tail is not None and not last_event_id:
        start = await calls.run(source.tail_offset, tail)
    if not follow:
        pieces = iter(await calls.run(source.pieces, start))
        first = await calls.run(next, pieces, "")  # an outage is reported by the status of the response
        text = calls.iterate(itertools.chain([first], pieces))
        return StreamingResponse(text, media_type="text/plain; charset=utf-8")
    number = attempt or max(job.attempt, 1)
    interval_s = JobFolder(settings.root, job.id).interval_s
    stream = streams.job_log(jobs, calls, source, job, number, start, interval_s)
    return LimitedStream(stream, caller, limits)


@router.get("/{job_id}/metrics", summary="Get a job's metrics as series")
async def job_metrics(
    job: Visible,
    settings: Config,
    storage: StorageCalls,
    metrics: Metrics,
    names: Annotated[
        str | None, Query(max_length=2000, description="Comma-separated metric names. Default: all metrics.")
    ] = None,
    max_points: Annotated[
        int, Query(ge=2, le=10_000, description="Maximum number of points per series; longer series are downsampled.")
    ] = 500,
    since_step: Annotated[
        int,
        Query(ge=0, le=MAX_NUMBER, description="First step to return; set it to continue from an earlier response."),
    ] = 0,
) -> MetricsView:
    selected = [name.strip() for name in names.split(",")] if names else []
    return await storage.run(metrics.view, run_folder(settings.root, job.id), selected, max_points, since_step)


@router.get(
    "/{job_id}/events",
    summary="Stream a job's past and future events",
    response_class=StreamingResponse,
    responses={200: {"content": EVENT_STREAM}},
)
async def job_events(
    job: Recorded, caller: Reader, limits: StreamLimitsDep, request: Request, last_event_id: LastEventId = 0
) -> Response:
    """Send a `job` event for each change, `progress` events in between, and a final `end` event.

    To resume, for example after a `reconnect` event, send the ID of the last `job` event as `Last-Event-ID`. The
    history of a deleted job is kept.
    """
    return LimitedStream(streams.job_events(request.app.state.watcher, job, last_event_id), caller, limits)


@router.get("/{job_id}/trials", summary="List the trials of a sweep")
async def job_trials(job: Visible, settings: Config, storage: StorageCalls) -> list[TrialView]:
    trials = views.trials(run_folder(settings.root, job.id))
    return await storage.run(lambda: list(with_progress(trials)))


@router.get("/{job_id}/checkpoints", summary="List the checkpoints that a job can resume from")
async def job_checkpoints(job: Visible, settings: Config, storage: StorageCalls) -> list[CheckpointView]:
    checkpoints = views.checkpoints(run_folder(settings.root, job.id))
    return await storage.run(lambda: list(with_progress(checkpoints)))
