"""/v1/jobs/{id}/neighbours: what an encoder holds to be alike, in the embeddings that a job has left."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from amd.downstream.embedding.files import EmbeddingIndex
from service.auth.authentication import Inferrer
from service.jobs.execution.protocol import JobFolder
from service.jobs.execution.reconciler import allowed_actions
from service.jobs.routes import Config, JobId, Jobs, Uris
from service.jobs.store import JobStore
from service.serving.requests import DEADLINE_S, Options, item_of
from service.serving.routes import Ways
from service.serving.schemas import NeighboursRequest, NeighbourView
from service.similarity.neighbours import Neighbour, Question, Shelf, nearest, of_location, of_record, of_vector
from service.web.errors import IllegalAction, NotPossible

router = APIRouter(prefix="/jobs", tags=["jobs"])


def _shelf(request: Request) -> Shelf:
    shelf: Shelf = request.app.state.shelf
    return shelf


Held = Annotated[Shelf, Depends(_shelf)]


@router.post("/{job_id}/neighbours", summary="What lies nearest among the embeddings of a job")
async def neighbours(
    request: Request,
    job_id: JobId,
    body: NeighboursRequest,
    caller: Inferrer,
    jobs: Jobs,
    settings: Config,
    shelf: Held,
    ways: Ways,
    policy: Uris,
) -> list[NeighbourView]:
    """Of a record of the data set, a location, a vector, or a file, which a deployment of the same encoder embeds.

    By cosine, the nearest first; a record is not its own neighbour.
    """
    output = JobFolder(settings.root, job_id).output
    index = await run_in_threadpool(_index, jobs, job_id, caller.project, shelf, output)
    vector: Any = body.vector
    if body.input is not None:
        item = item_of(body.input, "input", policy)
        want = Options().want("embedding")
        reply = await ways.ask(request, index.encoder, caller.project, [item], want, DEADLINE_S, exact=True)
        vector = reply.items[0]["embedding"]

    def search() -> list[Neighbour]:
        if vector is not None:
            question = of_vector(index, vector)
        elif body.record is not None:
            question = of_record(shelf, output, index, body.record)
        else:
            question = of_location(shelf, output, index, str(body.location))
        return _found(shelf, output, index, question, body.k)

    return [NeighbourView(**found._asdict()) for found in await run_in_threadpool(search)]


def _found(shelf: Shelf, output: str, index: EmbeddingIndex, question: Question, k: int) -> list[Neighbour]:
    return nearest(shelf.rows(output, (file.span for file in index.files)), question, k)


def _index(jobs: JobStore, job_id: str, project: str | None, shelf: Shelf, output: str) -> EmbeddingIndex:
    """Raises NotFound, NotPossible for a job of another kind, IllegalAction for one that has not succeeded."""
    job = jobs.get(job_id, project)
    if job.kind != "embed":
        raise NotPossible(f"{job.id} is of kind {job.kind}; neighbours are of a job of kind embed")
    try:
        if job.state == "succeeded":
            return shelf.index(output)
    except FileNotFoundError:
        raise NotPossible(f"the embeddings of {job.id} are no longer at {output}") from None
    raise IllegalAction(
        f"{job.id} is {job.state}; its embeddings can be asked once it has succeeded",
        allowed_actions=allowed_actions(job),
    )
