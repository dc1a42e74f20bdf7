"""The mask lab page: masks and reconstructions of a file, or of a sample from a job's data, at adjustable settings.

The page's script requests the layers and uses the same responses as the REST route. Pictures that a run wrote while it
trained are shown without the lab's replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from amd.presets.load import PRESETS_BY_KIND
from service.auth.authentication import Inferrer, Reader
from service.auth.sessions import PREFIX
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.db.models import Job, RegisteredEncoder
from service.jobs import routes as jobs_api
from service.jobs.details import routes as details_api
from service.jobs.routes import Config, Jobs, Locations, StorageCalls
from service.jobs.store import JobFilter, JobStore
from service.lab.routes import LabDep, draw_masks
from service.lab.schemas import LabView
from service.lab.sources import DEFAULT_PRESET
from service.registry.routes import EncodersDep
from service.registry.store import EncoderFilter, EncoderStore
from service.web.errors import NotFound

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

SHOWN = 200  # number of newest encoders and jobs to choose from


class LabSelection(NamedTuple):
    """The encoders to choose from, and the encoder and the job that the page opens with."""

    encoders: list[RegisteredEncoder]
    encoder: RegisteredEncoder | None
    job: Job | None
    """Job whose data supplies the samples, and whose pictures and checkpoints are shown."""


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
    preset: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """Show the page. `job` and `encoder` must exist; the script restores the other settings from the query.

    Without `job`, `encoder` and `preset`, the page shows the newest encoder and its job.
    """
    selection = await run_in_threadpool(_select, jobs, encoders, caller.project, job, encoder, preset)
    trained = selection.job if selection.job is not None and selection.job.kind == "train" else None
    checkpoints = await jobs_api.job_checkpoints(trained, settings, storage) if trained is not None else []
    media = await details_api.job_media(trained, settings, storage) if trained is not None else []
    training_jobs = await run_in_threadpool(_training_jobs, jobs, caller.project, selection.job)
    return render(
        request,
        "lab.html",
        job=selection.job,
        steps=sorted(one.step for one in checkpoints) if trained is not None and _rebuilds(trained) else [],
        picture_steps=[one.step for one in media],
        presets=PRESETS_BY_KIND["train"],
        default_preset=DEFAULT_PRESET,
        encoders=selection.encoders,
        encoder=selection.encoder,
        trained=training_jobs,
        job_names={one.id: one.name for one in training_jobs},
    )


def _select(
    jobs: JobStore, encoders: EncoderStore, project: str | None, job: str, encoder: str, preset: str
) -> LabSelection:
    """Return the chosen encoder and job, or an example. Raises NotFound if the chosen ones do not exist."""
    offered = list(encoders.list(EncoderFilter(project), limit=SHOWN).encoders)
    chosen = encoders.resolve(encoder, project) if encoder else None
    if chosen is not None and chosen.id not in [one.id for one in offered]:
        offered.insert(0, chosen)
    offered = [one for one in offered if one.card.get("decoder")]  # others cannot reconstruct pixels
    if job:
        return LabSelection(offered, chosen, jobs.get(job, project))
    if chosen is not None:
        return LabSelection(offered, chosen, _job_of(chosen, jobs, project))
    return LabSelection(offered, None, None) if preset else _example(jobs, offered, project)


def _training_jobs(jobs: JobStore, project: str | None, chosen: Job | None) -> list[Job]:
    """Return the newest training jobs, and the chosen job."""
    found = list(jobs.list(JobFilter(project, kinds=("train",)), limit=SHOWN).jobs)
    if chosen is not None and chosen.id not in [job.id for job in found]:
        found.insert(0, chosen)
    return found


def _job_of(encoder: RegisteredEncoder, jobs: JobStore, project: str | None) -> Job | None:
    """Return the job that trained an encoder, or None if the encoder was imported or the job was deleted."""
    with suppress(NotFound):
        job = jobs.get(encoder.job_id, project) if encoder.job_id is not None else None
        return job if job is not None and job.kind == "train" else None
    return None


def _example(jobs: JobStore, offered: Sequence[RegisteredEncoder], project: str | None) -> LabSelection:
    """Return the newest encoder with a job, or the newest job. Prefers encoders that have a teacher to show."""
    where = JobFilter(project, kinds=("train",), states=("running", "succeeded"))
    found = [one.id for one in jobs.list(where, limit=SHOWN).jobs]
    trained = sorted((one for one in offered if one.job_id in found), key=lambda one: one.card["objective"] != "amd")
    encoder = trained[0] if trained else None
    job_id = encoder.job_id if encoder is not None else next(iter(found), None)
    return LabSelection(list(offered), encoder, jobs.get(job_id, project) if job_id is not None else None)


def _rebuilds(job: Job) -> bool:
    """Return whether the student of a training job has a decoder."""
    return bool(job.config["objective"]["weights"]["reconstruction"])


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
