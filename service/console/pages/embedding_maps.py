"""The page with a job's embedding map, and the data that its script requests, as returned by the REST routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from service.auth.authentication import Reader
from service.auth.sessions import PREFIX
from service.console.pages.jobs import job_context
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.jobs.routes import Config, Jobs, Locations, StorageCalls, Visible
from service.jobs.store import JobFilter
from service.serving.routes import GatewayDep
from service.serving.schemas import NeighboursRequest, NeighbourView
from service.similarity import map_routes
from service.similarity import routes as similarity
from service.similarity.map_routes import MapView, Record
from service.similarity.routes import EmbeddingCacheDep

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

COMPARABLE = 50  # maximum number of embed jobs offered for comparison, newest first


@router.get("/jobs/{job_id}/map")
async def show_map(
    request: Request,
    job: Visible,
    caller: Reader,
    jobs: Jobs,
    settings: Config,
    other: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """Show the page. Its script requests the map, or shows why the job has none."""
    context = await run_in_threadpool(job_context, job, jobs, settings.root, "map")
    compared = await run_in_threadpool(jobs.get, other, caller.project) if other else None
    embedded = JobFilter(caller.project, kinds=("embed",), states=("succeeded",))
    offered = (await run_in_threadpool(jobs.list, embedded, limit=COMPARABLE)).jobs
    maps = [job, *([compared] if compared is not None else [])]
    others = [one for one in offered if one.id not in (job.id, other)]
    context |= {"maps": maps, "compared": compared, "others": others}
    return await run_in_threadpool(render, request, "map.html", **context)


@router.get("/jobs/{job_id}/map.json", response_model=MapView)
async def map_data(job: Visible, settings: Config, cache: EmbeddingCacheDep, storage: StorageCalls) -> Response:
    return await map_routes.embedding_map(job, settings, cache, storage)


@router.get("/jobs/{job_id}/map/thumbnails/{record}")
async def map_thumbnail(
    job: Visible, record: Record, settings: Config, cache: EmbeddingCacheDep, storage: StorageCalls
) -> Response:
    return await map_routes.thumbnail(job, record, settings, cache, storage)


@router.get("/jobs/{job_id}/map/neighbours.json")
async def map_neighbours(
    request: Request,
    job: Visible,
    caller: Reader,
    jobs: Jobs,
    settings: Config,
    cache: EmbeddingCacheDep,
    gateway: GatewayDep,
    policy: Locations,
    storage: StorageCalls,
    record: Annotated[int, Query(ge=0, le=2**53)],
    k: Annotated[int, Query(ge=1, le=100)] = 12,
) -> list[NeighbourView]:
    query = NeighboursRequest(record=record, k=k)
    return await similarity.neighbours(request, job.id, query, caller, jobs, settings, cache, gateway, policy, storage)
