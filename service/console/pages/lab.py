"""The mask lab: masks and reconstructions of a file, or of a sample of a job's data, at settings that one moves.

The script of the page requests the layers; the responses are those of the REST route.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from amd.presets.load import PRESETS_BY_KIND
from service.auth.authentication import Inferrer, Reader
from service.auth.sessions import PREFIX
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.jobs.routes import Jobs, Locations
from service.lab.routes import LabDep, draw_masks
from service.lab.schemas import LabView
from service.lab.sources import DEFAULT_PRESET
from service.registry.routes import EncodersDep
from service.registry.store import EncoderFilter

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

SHOWN = 200  # newest encoders that are offered


@router.get("/lab")
def show_lab(
    request: Request,
    caller: Reader,
    jobs: Jobs,
    encoders: EncodersDep,
    job: Annotated[str, Query(max_length=100)] = "",
    encoder: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Show the page. `job` and `encoder` must exist; the script restores the other settings from the query."""
    rows = list(encoders.list(EncoderFilter(caller.project), limit=SHOWN).encoders)
    if encoder and encoder not in [row.id for row in rows]:
        rows.insert(0, encoders.resolve(encoder, caller.project))
    rebuilding = [row for row in rows if row.card.get("decoder")]
    return render(
        request,
        "lab.html",
        job=jobs.get(job, caller.project) if job else None,
        presets=PRESETS_BY_KIND["train"],
        default_preset=DEFAULT_PRESET,
        encoders=rebuilding,
    )


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
