"""Routes under /v1/jobs/{id} for details: history, log search and ranges, samples, pictures, changes and clones."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from amd.training.reporting.media_files import PictureName
from service.auth.authentication import Submitter
from service.jobs import views
from service.jobs.config_bounds import MAX_WORKERS
from service.jobs.details import artifacts, changes, log_search, media, samples, trials
from service.jobs.details.schemas import (
    ArtifactList,
    CloneRequest,
    ForkRequest,
    HistoryView,
    JobChange,
    LogMatches,
    LogRange,
    MediaStepView,
    SampleFaults,
)
from service.jobs.execution.log_sources import open_log
from service.jobs.routes import Config, JobId, Jobs, Locations, Recorded, StorageCalls, Visible, submit
from service.jobs.schemas import JobView, TrialView
from service.web import downloads
from service.web.binary import BINARY, PICTURE_HEADERS, WEBP
from service.web.parameters import MAX_NUMBER, NOT_MODIFIED, IdempotencyKey, IfNoneMatch, PageSize

router = APIRouter(prefix="/jobs", tags=["jobs"])

MAX_RANGE = 2**20
MAX_TRIALS = 1_000_000

AttemptNumber = Annotated[
    int | None, Query(ge=1, le=MAX_NUMBER, description="Attempt number. Default: the newest attempt.")
]
RankNumber = Annotated[
    int | None,
    Query(ge=0, lt=MAX_WORKERS, description="Rank whose output to read. Default: the attempt's log."),
]
TrialNumber = Annotated[int, Path(ge=0, le=MAX_TRIALS, description="Trial number, starting at 0.")]


@router.get("/{job_id}/history", summary="Get a job's history")
def job_history(
    job: Recorded,
    jobs: Jobs,
    after: Annotated[int, Query(ge=0, le=MAX_NUMBER, description="Event number after which to continue.")] = 0,
    limit: PageSize = 100,
) -> HistoryView:
    """Return the events that `GET /v1/jobs/{id}/events` streams, in one response. A deleted job's history is kept."""
    events = jobs.events(job.id, after, limit + 1)
    items = [views.event_view(event) for event in events[:limit]]
    return HistoryView(items=items, next_after=items[-1].id if len(events) > limit else None)


@router.get("/{job_id}/logs/search", summary="Search a job's log")
async def search_log(
    request: Request,
    job: Visible,
    q: Annotated[
        str,
        Query(
            max_length=500, description="Text to search for in each line (case-insensitive). Default: match every line."
        ),
    ] = "",
    attempt: AttemptNumber = None,
    rank: RankNumber = None,
    limit: PageSize = 100,
) -> LogMatches:
    """Return the first matching lines, without colour codes."""
    calls, log = await open_log(request.app.state, job, attempt, rank)
    return await calls.run(log_search.search, log, q, limit)


@router.get("/{job_id}/logs/range", summary="Get a range of a job's log")
async def log_range(
    request: Request,
    job: Visible,
    before: Annotated[int | None, Query(ge=0, le=MAX_NUMBER, description="Offset at which the range ends.")] = None,
    after: Annotated[
        int, Query(ge=0, le=MAX_NUMBER, description="Offset at which the range starts; ignored if `before` is set.")
    ] = 0,
    size: Annotated[int, Query(ge=1024, le=MAX_RANGE, description="Maximum number of bytes.")] = 256 * 1024,
    attempt: AttemptNumber = None,
    rank: RankNumber = None,
) -> LogRange:
    """Return whole lines before or after an offset from a log stream or a search result."""
    calls, log = await open_log(request.app.state, job, attempt, rank)
    if before is not None:
        return await calls.run(log_search.before, log, before, size)
    return await calls.run(log_search.after, log, after, size)


@router.get("/{job_id}/bad-samples", summary="List a job's bad and damaged samples")
async def bad_samples(job: Visible, settings: Config, storage: StorageCalls, limit: PageSize = 200) -> SampleFaults:
    return await storage.run(samples.sample_faults, settings.root, job.id, limit)


@router.post("/{job_id}/trials/{number}/stop", status_code=202, summary="Stop a trial of a sweep")
async def stop_trial(
    caller: Submitter,
    job: Visible,
    number: TrialNumber,
    jobs: Jobs,
    settings: Config,
    storage: StorageCalls,
) -> TrialView:
    """Stop a running trial after a final checkpoint. Its scores are kept, and the sweep continues with other trials."""
    view, is_new = await storage.run(trials.write_stop_request, settings.root, job, number, caller.id)
    if is_new:
        await run_in_threadpool(trials.record_stop_request, jobs, job.id, number, caller.id)
    return view


@router.get("/{job_id}/media", summary="List the pictures that a job writes while it trains")
async def job_media(job: Visible, settings: Config, storage: StorageCalls) -> list[MediaStepView]:
    """Return the steps with pictures, ascending, once all pictures of a step are stored."""
    return await storage.run(media.list_media, settings.root, job.id)


@router.get(
    "/{job_id}/media/{step}/{picture}",
    summary="Get a picture from a job's training",
    response_class=Response,
    responses={200: {"content": {WEBP: BINARY}}},
)
async def job_picture(
    job: Visible,
    settings: Config,
    storage: StorageCalls,
    step: Annotated[int, Path(ge=0, le=MAX_NUMBER, description="Training step.")],
    picture: Annotated[PictureName, Path(description="File name of the picture.")],
) -> Response:
    """Return a WebP image of all samples: images side by side, videos row by row."""
    content = await storage.run(media.read, settings.root, job.id, step, picture)
    return Response(content, media_type=WEBP, headers=PICTURE_HEADERS)


@router.get("/{job_id}/artifacts", summary="List the files that a job has written")
async def job_artifacts(job: Visible, settings: Config, storage: StorageCalls) -> ArtifactList:
    """Return reports, metrics, test results and embeddings, but not checkpoints, in path order."""
    return await storage.run(artifacts.list_artifacts, settings.root, job)


@router.get(
    "/{job_id}/artifacts/{path:path}",
    summary="Download a file that a job has written",
    response_class=Response,
    responses={200: {"content": {downloads.BINARY: BINARY}}, **NOT_MODIFIED},
)
async def job_artifact(
    job: Visible,
    settings: Config,
    storage: StorageCalls,
    path: Annotated[str, Path(max_length=1024, description="Path of the file, as listed, such as `run/result.json`.")],
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Stream the file with `Content-Length` and `ETag`. Files on a local disk support `Range`."""
    return await artifacts.artifact_response(storage, settings.root, job, path, if_none_match)


@router.patch("/{job_id}", summary="Change a job's name, labels or priority")
def change_job(job_id: JobId, body: JobChange, caller: Submitter, jobs: Jobs, settings: Config) -> JobView:
    """The priority can be changed only while the job is waiting or paused."""
    job = changes.change(jobs, job_id, caller.project, body, caller.id)
    return views.job_view(job, jobs.newest_attempts([job]).get(job.id), settings.root)


@router.post("/{job_id}/clone", status_code=202, summary="Submit a copy of a job with changes")
def clone_job(
    job_id: JobId,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
    response: Response,
    body: CloneRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """The copy has the original job's config, preset and project, and starts where the original job started."""
    request = changes.clone_request(jobs.get(job_id, caller.project), body or CloneRequest())
    return submit(request, caller, jobs, settings, policy, response, idempotency_key)


@router.post("/{job_id}/fork", status_code=202, summary="Submit a copy of a job that starts from a checkpoint")
def fork_job(
    body: ForkRequest,
    job_id: JobId,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
    storage: StorageCalls,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """Pre-train from one of the job's checkpoints, which provides the weights, optimizer state and step.

    The job's config, with the changes, provides everything else, including the schedule.
    """
    job = jobs.get(job_id, caller.project)
    request = storage.run_from_thread(changes.fork_request, job, settings.root, body)
    return submit(request, caller, jobs, settings, policy, response, idempotency_key)
