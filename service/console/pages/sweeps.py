"""The sweep list, and a sweep's page: verdict, mask-ratio map, Pareto front, parallel coordinates, trials."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from amd.training.run_folder import run_folder
from service.auth.authentication import Reader, Submitter
from service.auth.sessions import PREFIX
from service.console.rendering import redirect, render
from service.console.security import ConsoleRoute
from service.db.models import Job
from service.jobs import routes as jobs_api
from service.jobs import views
from service.jobs.details import routes as details_api
from service.jobs.details.commands import override_arguments
from service.jobs.details.queue_place import queue_place
from service.jobs.routes import Config, Jobs, Locations, StorageCalls, Visible
from service.jobs.schemas import ACTIVE, JobRequest
from service.reports.sweep import (
    baseline_differences,
    current_importance,
    current_verdict,
    metric_name,
    ranked,
    read_job_sweep,
    read_sweep_report,
    score_map,
    trained_clips,
    trial_points,
)
from service.reports.sweep_content import best_command, best_overrides
from service.web.errors import NotFound
from tune_spaces.report.formatting import short
from tune_spaces.report.sweep import SweepHistory, dimensions
from tune_spaces.stop_requests import requested_stops

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

MAX_COLUMNS = 6  # maximum number of settings with a column of their own in the table of trials


@router.get("/sweeps")
def list_sweeps(
    request: Request,
    caller: Reader,
    jobs: Jobs,
    settings: Config,
    cursor: Annotated[str | None, Query(max_length=300)] = None,
) -> Response:
    page = jobs_api.list_jobs(caller, jobs, settings, kind=["search"], cursor=cursor or None, limit=50)
    return render(request, "sweeps.html", page=page)


@router.get("/sweeps/{job_id}")
def show_sweep(
    request: Request, job: Visible, jobs: Jobs, settings: Config, storage: StorageCalls, caller: Reader
) -> Response:
    sweep, problem = storage.run_from_thread(read_job_sweep, job, settings.root)
    report = storage.run_from_thread(read_sweep_report, job, settings.root)
    stops = storage.run_from_thread(requested_stops, run_folder(settings.root, job.id))
    return render(
        request,
        "sweep.html",
        job=views.job_detail(job, jobs.attempts(job.id), settings.root),
        tab="overview",
        place=queue_place(jobs, job),
        problem=problem,
        active=job.state in ACTIVE,
        verdict=current_verdict(report, sweep),
        **(_content(job, sweep, report, stops) if sweep is not None else {"trials": [], "best": None, "metric": ""}),
    )


def _content(job: Job, sweep: SweepHistory, report: dict[str, Any], stops: set[int]) -> dict[str, Any]:
    """Return what the page shows of a sweep with scored trials."""
    trials, names = ranked(trial_points(sweep, stops)), dimensions(sweep)
    settings = best_overrides(sweep)
    return {
        "trials": trials,
        "columns": list(names.items()) if len(names) <= MAX_COLUMNS else [],
        "short": short,
        "best": next((trial for trial in trials if trial.best), None),
        "settings": settings,
        "overrides": override_arguments({row.key: row.value for row in settings}),
        "command": best_command(job, sweep),
        "importance": current_importance(report, sweep),
        "differences": baseline_differences(report),
        "metric": metric_name(sweep),
        "fractions": sweep.config.fractions(),
        "clips": trained_clips(sweep),
    }


@router.get("/sweeps/{job_id}/charts.json")
def chart_data(job: Visible, settings: Config, storage: StorageCalls, caller: Reader) -> dict[str, Any]:
    """Return the data for a sweep's charts."""
    sweep, _ = storage.run_from_thread(read_job_sweep, job, settings.root)
    if sweep is None:
        return {"trials": [], "dimensions": [], "map": None, "rungs": []}
    found = score_map(sweep)
    cells = None
    if found is not None:
        cells = {
            "students": found.students,
            "teachers": found.teachers,
            "cells": [
                {"x": one.student, "y": one.teacher, "score": one.score, "sd": one.sd, "rung": one.level + 1}
                | {"trials": one.trials}
                for one in found.cells
            ],
        }
    curves = [
        {"number": one.number, "rungs": [[rung.fraction, rung.score] for _, rung in sorted(one.rungs.items())]}
        for one in sweep.trials
    ]
    return {
        "trials": [one._asdict() for one in trial_points(sweep)],
        "dimensions": [{"name": name, "title": text} for name, text in dimensions(sweep).items()],
        "map": cells,
        "curves": curves,
        "metric": metric_name(sweep),
        "top": sweep.top_level + 1,
    }


@router.post("/sweeps/{job_id}/trials/{number}/train")
def train_trial(
    request: Request,
    job: Visible,
    number: details_api.TrialNumber,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
    storage: StorageCalls,
) -> Response:
    """Submit a full-length training job with a trial's config."""
    sweep, _ = storage.run_from_thread(read_job_sweep, job, settings.root)
    trial = next((one for one in sweep.trials if one.number == number), None) if sweep is not None else None
    if trial is None or sweep is None:
        raise NotFound(f"{job.id} has no trial {number}")
    config = sweep.config.train.model_dump(mode="json", exclude={"name", "storage"})
    name = f"{job.name or job.id}, trial {number}"[:200]
    request_body = JobRequest(
        kind="train", config=config, overrides=trial.record.overrides, name=name, project=job.project, labels=job.labels
    )
    submitted = jobs_api.submit(request_body, caller, jobs, settings, policy, Response())
    return redirect(request, f"{PREFIX}/jobs/{submitted.id}")


@router.post("/sweeps/{job_id}/trials/{number}/stop")
async def stop_trial(
    request: Request,
    caller: Submitter,
    job: Visible,
    number: details_api.TrialNumber,
    jobs: Jobs,
    settings: Config,
    storage: StorageCalls,
) -> Response:
    await details_api.stop_trial(caller, job, number, jobs, settings, storage)
    return redirect(request, f"{PREFIX}/sweeps/{job.id}")
