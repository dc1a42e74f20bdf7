"""The list of sweeps, and a sweep's page: verdict, mask-ratio map, Pareto front, parallel coordinates, trials."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from amd.config import ConfigError
from amd.storage import exists, join, read_json
from amd.training.run_folder import run_folder
from service.auth.authentication import Reader, Submitter
from service.auth.sessions import PREFIX
from service.console.rendering import redirect, render
from service.console.security import ConsoleRoute
from service.db.models import Job
from service.jobs import routes as jobs_api
from service.jobs import views
from service.jobs.details.queue_place import queue_place
from service.jobs.routes import Config, Jobs, Locations, StorageCalls, Visible
from service.jobs.schemas import JobRequest
from service.web.errors import NotFound
from tune_spaces.report.formatting import title
from tune_spaces.report.ratio_map import ratio_map
from tune_spaces.report.sweep import SweepHistory, TrialHistory, dimensions, read_sweep
from tune_spaces.report.verdict import METRIC_NAMES

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)


class TrialPoint(NamedTuple):
    """One trial, as shown on the sweep's page and in its charts."""

    number: int
    title: str
    point: dict[str, Any]
    state: str
    rung: int
    """Highest rung reached, starting at 1; 0 if there is none."""
    score: float | None
    spread: float | None
    """Standard deviation of the score across seeds at the highest rung reached."""
    speed: float | None
    gflops: float | None
    best: bool
    baseline: bool
    reason: str
    runs: tuple[str, ...]


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
def show_sweep(request: Request, job: Visible, jobs: Jobs, settings: Config, storage: StorageCalls) -> Response:
    sweep, problem = storage.run_from_thread(_read, job, settings.root)
    detail = views.job_detail(job, jobs.attempts(job.id), settings.root)
    trials = trial_points(sweep) if sweep is not None else []
    return render(
        request,
        "sweep.html",
        job=detail,
        tab="overview",
        place=queue_place(jobs, job),
        problem=problem,
        trials=sorted(trials, key=lambda one: (one.state == "failed", -one.rung, -(one.score or 0.0), one.number)),
        verdict=storage.run_from_thread(current_verdict, job, sweep, settings.root),
        metric=METRIC_NAMES.get(sweep.config.metric, sweep.config.metric) if sweep is not None else "",
        rungs=sweep.levels if sweep is not None else 0,
        clips=sum(rung.clips for one in sweep.trials for rung in list(one.record.rungs)[-1:]) if sweep else 0,
    )


@router.get("/sweeps/{job_id}/charts.json")
def chart_data(job: Visible, settings: Config, storage: StorageCalls, caller: Reader) -> dict[str, Any]:
    """Return the data for a sweep's charts."""
    sweep, _ = storage.run_from_thread(_read, job, settings.root)
    if sweep is None:
        return {"trials": [], "dimensions": [], "map": None, "rungs": []}
    found = ratio_map(sweep, sweep.top_level) if sweep.scored else None
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
        "metric": METRIC_NAMES.get(sweep.config.metric, sweep.config.metric),
    }


@router.post("/sweeps/{job_id}/trials/{number}/train")
def train_trial(
    request: Request,
    job: Visible,
    number: int,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
    storage: StorageCalls,
) -> Response:
    """Submit a full-length training job with a trial's config."""
    sweep, _ = storage.run_from_thread(_read, job, settings.root)
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


def _read(job: Job, root: str) -> tuple[SweepHistory | None, str]:
    """Return the sweep's history, or None with the reason why it is not yet available."""
    if job.kind != "search":
        raise NotFound(f"{job.id} is not a sweep")
    folder = run_folder(root, job.id)
    try:
        return read_sweep(folder), ""
    except ConfigError as error:
        return None, str(error).removeprefix(f"{folder}: ")


def trial_points(sweep: SweepHistory) -> list[TrialPoint]:
    names = dimensions(sweep)
    best = sweep.best
    return [_point(sweep, one, names, one is best) for one in sweep.trials]


def _point(sweep: SweepHistory, trial: TrialHistory, names: dict[str, str], best: bool) -> TrialPoint:
    rung = trial.rungs.get(trial.reach)
    seeds = sweep.seeds(rung) if rung is not None else ()
    mean = sum(seeds) / len(seeds) if seeds else 0.0
    spread = (sum((value - mean) ** 2 for value in seeds) / (len(seeds) - 1)) ** 0.5 if len(seeds) > 1 else None
    record = trial.record
    return TrialPoint(
        number=record.number,
        title=title(record.point, names),
        point=record.point,
        state=record.state,
        rung=trial.reach + 1,
        score=rung.score if rung is not None else None,
        spread=spread,
        speed=rung.clips_per_s or None if rung is not None else None,
        gflops=record.costs.get("step_gflops", record.costs.get("teacher_gflops")),
        best=best,
        baseline=record.baseline,
        reason=": ".join(part for part in (record.reason, record.message) if part) if trial.failed else "",
        runs=record.runs,
    )


def current_verdict(job: Job, sweep: SweepHistory | None, root: str) -> str:
    """Return the verdict of the sweep's report or, if there is no report yet, the best trial so far.

    Computing the report's confidence intervals requires SciPy, which is not installed in the control plane.
    """
    report = join(run_folder(root, job.id), "report", "report.json")
    if exists(report):
        return str(read_json(report).get("verdict", ""))
    if sweep is None or not sweep.scored:
        return "No trial has been scored yet."
    best = sweep.best
    ended = sum(one.record.state != "running" for one in sweep.trials)
    failed = sum(one.failed for one in sweep.trials)
    if best is None:
        return "All scored trials have failed so far."
    score = best.rungs[best.reach].score
    metric = METRIC_NAMES.get(sweep.config.metric, sweep.config.metric)
    parts = [
        f"Best so far: trial {best.number} ({title(best.record.point, dimensions(sweep))}) with {score:.2f} % {metric} "
        f"at rung {best.reach + 1} of {sweep.levels}.",
        f"{ended} of {sweep.config.budget.trials} trials have ended"
        + (f", {failed} of them failed." if failed else "."),
    ]
    base = sweep.baseline
    if base is not None and base is not best and best.reach in base.rungs:
        gain = score - base.rungs[best.reach].score
        parts.append(f"The base config scored {gain:.2f} points lower; the report states whether that is significant.")
    return " ".join(parts)
