"""The mask lab page: masks and reconstructions of a file, or of a sample from a job's data, at adjustable settings.

The page's script requests the layers and uses the same responses as the REST route.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from amd.presets.load import PRESETS_BY_KIND
from service.auth.authentication import Inferrer, Reader
from service.auth.sessions import PREFIX
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.db.models import Job, RegisteredEncoder
from service.jobs import routes as jobs_api
from service.jobs.routes import Config, Jobs, Locations, StorageCalls
from service.lab.routes import LabDep, draw_masks
from service.lab.schemas import LabView
from service.lab.sources import DEFAULT_PRESET
from service.registry.routes import EncodersDep
from service.registry.store import EncoderFilter, EncoderStore

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

SHOWN = 200  # number of newest encoders to choose from


@router.get("/lab")
async def show_lab(
    request: Request,
    caller: Reader,
    jobs: Jobs,
    encoders: EncodersDep,
    settings: Config,
    storage: StorageCalls,
    job: Annotated[str, Query(max_length=100)] = "",
    encoder: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Show the page. `job` and `encoder` must exist; the script restores the other settings from the query."""
    shown = await run_in_threadpool(jobs.get, job, caller.project) if job else None
    checkpoints = await jobs_api.job_checkpoints(shown, settings, storage) if shown is not None else []
    return render(
        request,
        "lab.html",
        job=shown,
        steps=sorted(one.step for one in checkpoints) if shown is not None and _rebuilds(shown) else [],
        presets=PRESETS_BY_KIND["train"],
        default_preset=DEFAULT_PRESET,
        encoders=await run_in_threadpool(_offered, encoders, encoder, caller.project),
    )


def _rebuilds(job: Job) -> bool:
    """Return whether the student of a training job has a decoder."""
    return bool(job.config["objective"]["weights"]["reconstruction"]) if job.kind == "train" else False


def _offered(encoders: EncoderStore, chosen: str, project: str | None) -> list[RegisteredEncoder]:
    """Return the newest encoders and the chosen one, if they can reconstruct pixels.

    Raises NotFound if the chosen one does not exist.
    """
    rows = list(encoders.list(EncoderFilter(project), limit=SHOWN).encoders)
    if chosen and chosen not in [row.id for row in rows]:
        rows.insert(0, encoders.resolve(chosen, project))
    return [row for row in rows if row.card.get("decoder")]


@router.post("/lab/masks")
async def lab_masks(
    request: Request,
    response: Response,
    caller: Inferrer,
    lab: LabDep,
    jobs: Jobs,
    encoders: EncodersDep,
    policy: Locations,
) -> LabView:
    return await draw_masks(request, response, caller, lab, jobs, encoders, policy)
