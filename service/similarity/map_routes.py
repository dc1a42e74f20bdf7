"""Routes /v1/jobs/{id}/map: the map of a job's embeddings, and thumbnails of its samples.

The job computes both. This process does not decode images: it checks that a thumbnail is a WebP file of limited size,
and sends it with headers that keep browsers from interpreting it as anything else.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import ConfigDict

from amd.downstream.embedding.map_files import DamagedMap, EmbeddingMap, read_map, read_thumbnail
from service.db.models import Job
from service.jobs.execution.protocol import JobFolder
from service.jobs.routes import Config, StorageCalls, Visible
from service.similarity.neighbours import EmbeddingCache
from service.similarity.routes import EmbeddingCacheDep, load_index
from service.web.binary import BINARY, PICTURE_HEADERS, WEBP
from service.web.errors import NotFound, Refusal

router = APIRouter(prefix="/jobs", tags=["jobs"])

THUMBNAIL_HEADERS = {
    **PICTURE_HEADERS,
    "Cache-Control": "private, max-age=600",
    "Content-Encoding": "identity",  # images are compressed already
}

Record = Annotated[int, Path(ge=0, le=2**53, description="Index of the record in the data set.")]


class MapView(EmbeddingMap):
    """Two-dimensional layout of a job's embeddings. Lists have one value per sample, in manifest order."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    job: str
    """Job ID."""
    thumbnails: bool
    """Whether the samples have thumbnails."""
    unreadable: int
    """Number of samples that could not be read, and so have no embedding."""


@router.get("/{job_id}/map", summary="Get the map of a job's embeddings", response_model=MapView)
async def embedding_map(job: Visible, settings: Config, cache: EmbeddingCacheDep, storage: StorageCalls) -> Response:
    """Return the two-dimensional layout that an embed job wrote, with clusters and scores.

    The layout, the number of clusters and the thumbnails are job options.
    """
    output = JobFolder(settings.root, job.id).output
    content = await storage.run(_render_map, job, cache, output)
    # Compressing megabytes would keep the event loop busy.
    return Response(content, media_type="application/json", headers={"Content-Encoding": "identity"})


@router.get(
    "/{job_id}/map/thumbnails/{record}",
    summary="Get the thumbnail of a sample",
    response_class=Response,
    responses={200: {"content": {WEBP: BINARY}}},
)
async def thumbnail(
    job: Visible, record: Record, settings: Config, cache: EmbeddingCacheDep, storage: StorageCalls
) -> Response:
    """Return a WebP image of at most 64 KiB: the sample as the encoder sees it; for a clip, a strip of its frames."""
    output = JobFolder(settings.root, job.id).output
    image = await storage.run(_load_thumbnail, job, cache, output, record)
    return Response(image, media_type=WEBP, headers=THUMBNAIL_HEADERS)


def _render_map(job: Job, cache: EmbeddingCache, output: str) -> str:
    """Return the map as JSON. Raises Refusal or IllegalAction if the job has none."""
    index = load_index(job, cache, output)
    try:
        found = read_map(output)
    except FileNotFoundError:
        raise Refusal(
            "not_possible",
            f"the embeddings of {job.id} have no map; set layout=pca and embed the data set again, which only adds the "
            "map if the output folder is the same",
        ) from None
    except DamagedMap as damage:
        raise Refusal("not_possible", f"{damage}; embed the data set again to rewrite it") from None
    return MapView(job=job.id, thumbnails=index.thumbnails, unreadable=len(index.bad), **dict(found)).model_dump_json()


def _load_thumbnail(job: Job, cache: EmbeddingCache, output: str, record: int) -> bytes:
    """Return a record's thumbnail. Raises NotFound, or Refusal if the file is damaged."""
    index = load_index(job, cache, output)
    image = None
    try:
        for file in index.files:
            if record in file.span:
                image = read_thumbnail(output, file.span, record)
    except DamagedMap as damage:
        raise Refusal("not_possible", str(damage)) from None
    except FileNotFoundError:
        raise NotFound(f"the embeddings of {job.id} have no thumbnails; set thumbnails=true for the next run") from None
    if image is None:
        raise NotFound(f"record {record} does not exist or could not be read; the set has {index.samples} records")
    return image
