"""Data and downloads for a job's pages: metrics, events, logs, pictures and reports, as returned by the REST routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from amd.training.reporting.media_files import PictureName
from service.auth.authentication import Reader
from service.auth.sessions import PREFIX
from service.console.security import ConsoleRoute
from service.jobs import routes as jobs_api
from service.jobs.config_bounds import MAX_WORKERS
from service.jobs.details import routes as details_api
from service.jobs.details.schemas import LogMatches, LogRange
from service.jobs.routes import Config, Jobs, Metrics, Recorded, StorageCalls, StreamLimitsDep, Visible
from service.jobs.schemas import MetricsView
from service.registry.routes import EncodersDep
from service.reports import routes as reports_api
from service.web.parameters import MAX_NUMBER, LastEventId

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

MAX_POINTS = 800
MATCHES = 200
Attempt = Annotated[int | None, Query(ge=1, le=MAX_NUMBER)]
Rank = Annotated[int | None, Query(ge=0, lt=MAX_WORKERS)]
Offset = Annotated[int, Query(ge=0, le=MAX_NUMBER)]
ArtifactPath = Annotated[str, Path(max_length=1024)]
Step = Annotated[int, Path(ge=0, le=MAX_NUMBER)]


@router.get("/jobs/{job_id}/metrics.json")
async def metrics(
    job: Visible, settings: Config, storage: StorageCalls, cache: Metrics, since_step: Offset = 0
) -> MetricsView:
    return await jobs_api.job_metrics(job, settings, storage, cache, None, MAX_POINTS, since_step)


@router.get("/jobs/{job_id}/media/{step}/{picture}")
async def job_picture(
    job: Visible, settings: Config, storage: StorageCalls, step: Step, picture: PictureName
) -> Response:
    return await details_api.job_picture(job, settings, storage, step, picture)


@router.get("/jobs/{job_id}/artifacts/{path:path}")
async def download_artifact(job: Visible, settings: Config, storage: StorageCalls, path: ArtifactPath) -> Response:
    return await details_api.job_artifact(job, settings, storage, path)


@router.get("/jobs/{job_id}/events")
async def events(
    request: Request, job: Recorded, caller: Reader, limits: StreamLimitsDep, last_event_id: LastEventId = 0
) -> Response:
    return await jobs_api.job_events(job, caller, limits, request, last_event_id)


@router.get("/jobs/{job_id}/log/follow")
async def follow_log(
    request: Request,
    job: Visible,
    caller: Reader,
    limits: StreamLimitsDep,
    jobs: Jobs,
    settings: Config,
    offset: Offset = 0,
    attempt: Attempt = None,
    rank: Rank = None,
    last_event_id: LastEventId = 0,
) -> Response:
    return await jobs_api.job_logs(
        job, caller, request, limits, jobs, settings, True, None, attempt, rank, offset, last_event_id
    )


@router.get("/jobs/{job_id}/log/range")
async def log_range(
    request: Request,
    job: Visible,
    before: Annotated[int | None, Query(ge=0, le=MAX_NUMBER)] = None,
    after: Offset = 0,
    attempt: Attempt = None,
    rank: Rank = None,
) -> LogRange:
    return await details_api.log_range(request, job, before, after, attempt=attempt, rank=rank)


@router.get("/jobs/{job_id}/log/search")
async def search_log(
    request: Request,
    job: Visible,
    q: Annotated[str, Query(min_length=1, max_length=500)],
    attempt: Attempt = None,
    rank: Rank = None,
) -> LogMatches:
    return await details_api.search_log(request, job, q, attempt, rank, MATCHES)


@router.get("/jobs/{job_id}/log/download")
async def download_log(
    request: Request,
    job: Visible,
    caller: Reader,
    limits: StreamLimitsDep,
    jobs: Jobs,
    settings: Config,
    attempt: Attempt = None,
    rank: Rank = None,
) -> Response:
    response = await jobs_api.job_logs(job, caller, request, limits, jobs, settings, False, None, attempt, rank)
    response.headers["Content-Disposition"] = f'attachment; filename="{job.id}.log"'
    return response


@router.get("/jobs/{job_id}/report")
def download_report(
    job: Visible, caller: Reader, jobs: Jobs, encoders: EncodersDep, settings: Config, storage: StorageCalls
) -> Response:
    return reports_api.job_report(job, caller, jobs, encoders, settings, storage)
