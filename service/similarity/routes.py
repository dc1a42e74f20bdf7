"""Route /v1/jobs/{id}/neighbours: nearest-neighbour search in a job's embeddings."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from amd.downstream.embedding.files import EmbeddingIndex
from service.auth.authentication import Reader
from service.db.models import Job
from service.jobs.actions import allowed_actions
from service.jobs.execution.protocol import JobFolder
from service.jobs.routes import Config, JobId, Jobs, Locations, StorageCalls
from service.serving.requests import DEADLINE_S, RequestOptions, input_size, parse_input
from service.serving.routes import GatewayDep
from service.serving.schemas import NeighboursRequest, NeighbourView
from service.similarity.neighbours import (
    EmbeddingCache,
    Neighbour,
    NeighbourQuery,
    nearest,
    query_by_location,
    query_by_record,
    query_by_vector,
)
from service.web.bounded_calls import with_progress
from service.web.errors import IllegalAction, Refusal
from service.web.request_bodies import LargeJsonRoute, run_in_thread

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=LargeJsonRoute)


async def _embedding_cache(request: Request) -> EmbeddingCache:
    cache: EmbeddingCache = request.app.state.embedding_cache
    return cache


EmbeddingCacheDep = Annotated[EmbeddingCache, Depends(_embedding_cache)]


@router.post("/{job_id}/neighbours", summary="Find the nearest neighbours in a job's embeddings")
async def neighbours(
    request: Request,
    job_id: JobId,
    body: NeighboursRequest,
    caller: Reader,
    jobs: Jobs,
    settings: Config,
    cache: EmbeddingCacheDep,
    gateway: GatewayDep,
    policy: Locations,
    storage: StorageCalls,
) -> list[NeighbourView]:
    """Search by record index, file location or vector, or by an uploaded file that a deployment embeds.

    Neighbours are ordered by cosine similarity, nearest first. A record is not its own neighbour.
    """
    output = JobFolder(settings.root, job_id).output
    job = await run_in_threadpool(jobs.get, job_id, caller.project)
    index = await storage.run(load_index, job, cache, output)
    vector: Any = body.vector
    if body.input is not None:
        item = await run_in_thread(input_size(body.input), parse_input, body.input, "input", policy, caller.project)
        options = RequestOptions().for_engine("embedding")
        reply = await gateway.infer(request, index.encoder, caller.project, [item], options, DEADLINE_S, exact=True)
        vector = reply.items[0]["embedding"]

    def search() -> list[Neighbour]:
        if vector is not None:
            query = query_by_vector(index, vector)
        elif body.record is not None:
            query = query_by_record(cache, output, index, body.record)
        else:
            query = query_by_location(cache, output, index, str(body.location))
        return _search(cache, output, index, query, body.k)

    return [NeighbourView(**found._asdict()) for found in await storage.run(search)]


def _search(
    cache: EmbeddingCache, output: str, index: EmbeddingIndex, query: NeighbourQuery, k: int
) -> list[Neighbour]:
    return nearest(with_progress(cache.rows(output, (file.span for file in index.files))), query, k)


def load_index(job: Job, cache: EmbeddingCache, output: str) -> EmbeddingIndex:
    """Return the index of a job's embeddings.

    Raises Refusal if the job is not of kind embed or if its embeddings no longer exist. Raises IllegalAction if the job
    has not succeeded.
    """
    if job.kind != "embed":
        raise Refusal("not_possible", f"{job.id} is a job of kind {job.kind}; only jobs of kind embed have embeddings")
    try:
        if job.state == "succeeded":
            return cache.index(output)
    except FileNotFoundError:
        raise Refusal("not_possible", f"the embeddings of {job.id} are no longer at {output}") from None
    raise IllegalAction(
        f"{job.id} is {job.state}; its embeddings can be used once it has succeeded",
        allowed_actions=allowed_actions(job),
    )
