"""Job pages: the job list, the pages of a single job, and job actions."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from amd.training.run_folder import run_folder
from service.auth.authentication import Reader, Submitter
from service.auth.sessions import PREFIX
from service.console.forms import FormDep, parse, parse_labels
from service.console.rendering import redirect, render
from service.console.security import ConsoleRoute
from service.db.models import Job
from service.jobs import routes as jobs_api
from service.jobs import views
from service.jobs.actions import act
from service.jobs.details import routes as details_api
from service.jobs.details.config_diff import base_config, config_rows
from service.jobs.details.queue_place import queue_place
from service.jobs.details.schemas import JobChange
from service.jobs.execution.log_sources import ranks_with_log
from service.jobs.execution.protocol import JobFolder
from service.jobs.kinds import JobKind
from service.jobs.routes import Config, JobId, Jobs, Locations, Recorded, StorageCalls, Visible
from service.jobs.schemas import Action, State
from service.jobs.store import JobStore

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

PAGE = 50
HISTORY = 200
SHOWN_FILES = 200
KINDS = get_args(JobKind)
STATES = get_args(State)
KINDS_WITH_PRESETS = ("train", "finetune", "detect", "search")


@router.get("/jobs")
def list_jobs(
    request: Request,
    caller: Reader,
    jobs: Jobs,
    settings: Config,
    q: Annotated[str, Query(max_length=200)] = "",
    state: Annotated[list[State] | None, Query()] = None,
    kind: Annotated[list[JobKind] | None, Query()] = None,
    label: Annotated[str, Query(max_length=320)] = "",
    cursor: Annotated[str | None, Query(max_length=300)] = None,
) -> Response:
    labels = [label] if "=" in label.strip("=") else None
    page = jobs_api.list_jobs(
        caller, jobs, settings, kind, state, labels, None, q, facets=True, cursor=cursor or None, limit=PAGE
    )
    chosen = {"q": q, "state": state or [], "kind": kind or [], "label": label}
    older = _query({**chosen, "cursor": page.next_cursor}) if page.next_cursor else None
    here = _query({**chosen, "cursor": cursor})
    return render(
        request,
        "jobs.html",
        page=page,
        chosen=chosen,
        older=older,
        newest=_query(chosen) if cursor else None,
        here=here,
        states=STATES,
        kinds=KINDS,
        filtered=bool(q or state or kind or label),
    )


def _query(values: dict[str, Any]) -> str:
    return urlencode({name: value for name, value in values.items() if value}, doseq=True)


@router.get("/jobs/{job_id}")
def show_job(request: Request, job: Visible, jobs: Jobs, settings: Config) -> Response:
    if job.kind == "search":
        return RedirectResponse(f"{PREFIX}/sweeps/{job.id}", HTTPStatus.SEE_OTHER)
    return render(request, "job.html", **job_context(job, jobs, settings.root, "overview"))


@router.get("/jobs/{job_id}/head")
def job_head(request: Request, job: Visible, jobs: Jobs, settings: Config) -> Response:
    """Render the part of a job's pages that changes while the job runs."""
    context = job_context(job, jobs, settings.root, "")
    return render(request, "fragments/job_head.html", **context)


@router.get("/jobs/{job_id}/log")
async def job_log(
    request: Request,
    job: Visible,
    jobs: Jobs,
    settings: Config,
    storage: StorageCalls,
    attempt: Annotated[int | None, Query(ge=1)] = None,
    rank: Annotated[str, Query(pattern=r"^[0-9]{0,6}$")] = "",
) -> Response:
    context = await run_in_threadpool(job_context, job, jobs, settings.root, "log")
    chosen: dict[str, Any] = {"chosen_attempt": attempt or job.attempt, "rank": int(rank) if rank else None}
    ranks = await storage.run(ranks_with_log, run_folder(settings.root, job.id))
    return await run_in_threadpool(render, request, "job_log.html", **context, **chosen, ranks=ranks)


@router.get("/jobs/{job_id}/config")
def job_config(request: Request, job: Visible, jobs: Jobs, settings: Config, caller: Reader) -> Response:
    context = job_context(job, jobs, settings.root, "config")
    base = base_config(job.kind, job.preset, job.config)
    return render(
        request,
        "job_config.html",
        **context,
        rows=config_rows(job.config, base),
        has_base=base is not None,
        is_complete=job.preset is None and job.origin == "api" and job.kind in KINDS_WITH_PRESETS,
    )


@router.get("/jobs/{job_id}/history")
def job_history(request: Request, job: Recorded, jobs: Jobs, settings: Config, caller: Reader) -> Response:
    context = job_context(job, jobs, settings.root, "history")
    return render(request, "job_history.html", **context, events=details_api.job_history(job, jobs, 0, HISTORY).items)


@router.get("/jobs/{job_id}/files")
async def job_files(
    request: Request, job: Visible, jobs: Jobs, settings: Config, storage: StorageCalls, caller: Reader
) -> Response:
    context = await run_in_threadpool(job_context, job, jobs, settings.root, "files")
    return await run_in_threadpool(
        render,
        request,
        "job_files.html",
        **context,
        checkpoints=await jobs_api.job_checkpoints(job, settings, storage),
        faults=await details_api.bad_samples(job, settings, storage),
        artifacts=await details_api.job_artifacts(job, settings, storage),
        shown=SHOWN_FILES,
        output=JobFolder(settings.root, job.id).output,
    )


@router.get("/jobs/{job_id}/pictures")
async def job_pictures(
    request: Request, job: Visible, jobs: Jobs, settings: Config, storage: StorageCalls, caller: Reader
) -> Response:
    context = await run_in_threadpool(job_context, job, jobs, settings.root, "pictures")
    steps = [found.step for found in await details_api.job_media(job, settings, storage)]
    return await run_in_threadpool(render, request, "job_pictures.html", **context, steps=steps)


@router.post("/jobs/{job_id}/edit")
def edit_job(
    request: Request, job_id: JobId, caller: Submitter, jobs: Jobs, settings: Config, form: FormDep
) -> Response:
    labels = parse_labels(form.text("labels").splitlines())
    values: dict[str, Any] = {"name": form.text("name") or None, "labels": labels}
    if form.text("priority"):
        values["priority"] = form.text("priority")
    details_api.change_job(job_id, parse(JobChange, values), caller, jobs, settings)
    return redirect(request, f"{PREFIX}/jobs/{job_id}")


@router.post("/jobs/{job_id}/{action}")
def act_on_job(
    request: Request,
    job_id: JobId,
    action: Action,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
) -> Response:
    if action == "retry":
        jobs_api.retry_job(job_id, caller, jobs, settings, policy)
    else:
        act(jobs, job_id, caller.project, action, caller.id)
    return redirect(request, f"{PREFIX}/jobs" if action == "delete" else f"{PREFIX}/jobs/{job_id}")


def job_context(job: Job, jobs: JobStore, root: str, tab: str) -> dict[str, Any]:
    """Return the template context shared by all pages of a job."""
    detail = views.job_detail(job, jobs.attempts(job.id), root)
    return {"job": detail, "tab": tab, "place": queue_place(jobs, job)}
