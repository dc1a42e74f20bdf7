"""Route /v1/jobs/{id}/report: the report on a run or sweep, as a single file."""

from __future__ import annotations

from itertools import chain

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from service.auth.authentication import Principal, Reader
from service.db.models import Job
from service.jobs import views
from service.jobs.routes import Config, Jobs, StorageCalls, Visible
from service.jobs.schemas import JobDetail
from service.registry import routes as registry_api
from service.registry.lineage import lineage
from service.registry.routes import EncodersDep
from service.registry.schemas import EncoderDetail
from service.registry.store import EncoderStore
from service.reports.page import POLICY, render_report
from service.reports.run import RunContent, read_curves, read_origin, run_charts
from service.reports.sweep_content import read_sweep_content
from service.web.bounded_calls import BoundedCalls
from service.web.errors import NotFound

router = APIRouter(prefix="/jobs", tags=["jobs"])

HEADERS = {"Content-Security-Policy": f"{POLICY}; sandbox", "X-Content-Type-Options": "nosniff"}


@router.get(
    "/{job_id}/report",
    summary="Download a report on a job",
    response_class=Response,
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
)
def job_report(
    job: Visible, caller: Reader, jobs: Jobs, encoders: EncodersDep, settings: Config, storage: StorageCalls
) -> Response:
    """Return a report as a single HTML file that contains no scripts and loads nothing from other files or hosts.

    A run's report contains its curves, its config compared with the preset, and the published encoder with its scores,
    lineage and licence. A sweep's report contains its verdict, the mask ratio map, the Pareto front and the trials.
    Both explain how to repeat the job.
    """
    detail = views.job_detail(job, jobs.attempts(job.id), settings.root)
    if job.kind == "search":
        page = render_report(detail, storage.run_from_thread(read_sweep_content, job, settings.root))
    else:
        page = render_report(detail, _run_content(job, detail, caller, encoders, settings.root, storage))
    disposition = f'attachment; filename="{job.id}.html"'
    return HTMLResponse(page, headers={**HEADERS, "Content-Disposition": disposition})


def _run_content(
    job: Job, detail: JobDetail, caller: Principal, encoders: EncoderStore, root: str, storage: BoundedCalls
) -> RunContent:
    charts, omitted = run_charts(storage.run_from_thread(read_curves, root, job.id))
    encoder = _encoder(detail.encoder, caller, encoders)
    stages = lineage(encoder, [], root) if encoder is not None else []
    origin = storage.run_from_thread(read_origin, root, job.id, job.config)
    return RunContent(charts, omitted, encoder, list(chain.from_iterable(stages)), origin)


def _encoder(name: str | None, caller: Principal, encoders: EncoderStore) -> EncoderDetail | None:
    """Return the encoder that a job published; None if it published none, or if the encoder no longer exists."""
    if name is None:
        return None
    try:
        return registry_api.get_encoder(encoders.resolve(name, caller.project), caller, encoders, Response())
    except NotFound:
        return None
