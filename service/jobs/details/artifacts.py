"""List and download the files that a job has written: reports, metrics, test results, Parquet files.

Paths start with the folder: `run/` for the run folder, without checkpoints, and `output/` for the output of a job such
as an embedding. Symbolic links are neither listed nor followed.
"""

from __future__ import annotations

import math
from datetime import datetime

from starlette.responses import Response

from amd.storage import FileFacts, StoredFile, walk_files
from amd.training.run_folder import LEASE, run_folder
from service.db.models import Job
from service.jobs.details.schemas import ArtifactList, ArtifactView
from service.jobs.execution.protocol import JobFolder
from service.web import downloads
from service.web.bounded_calls import BoundedCalls
from service.web.errors import NotFound
from service.web.schemas import utc_datetime_or_none

MAX_ARTIFACTS = 10_000  # the listed ones; any can be downloaded
CHECKPOINTS = "checkpoints/"  # GET /v1/jobs/{id}/checkpoints lists them


def list_artifacts(root: str, job: Job) -> ArtifactList:
    """Return the files in path order. Raises StorageError."""
    found = sorted(_find(root, job.id), key=lambda view: view.path)
    return ArtifactList(items=found[:MAX_ARTIFACTS], total=len(found), bytes=sum(view.bytes for view in found))


async def artifact_response(
    storage: BoundedCalls, root: str, job: Job, path: str, if_none_match: str | None
) -> Response:
    """Stream one file. Raises NotFound."""
    found = {view.path: view for view in await storage.run(_find, root, job.id)}
    if path not in found:
        raise NotFound(f"{job.id} has no artifact {path!r}; GET /v1/jobs/{job.id}/artifacts lists them")
    folder, _, name = path.partition("/")
    facts = FileFacts(found[path].bytes, f"{found[path].bytes}-{found[path].modified_at}")
    return await downloads.file_response(storage, _folders(root, job.id)[folder], name, facts, if_none_match)


def _folders(root: str, job_id: str) -> dict[str, str]:
    return {"run": run_folder(root, job_id), "output": JobFolder(root, job_id).output}


def _find(root: str, job_id: str) -> list[ArtifactView]:
    return [
        ArtifactView(path=f"{folder}/{name}", bytes=file.size, modified_at=_modified(file))
        for folder, url in _folders(root, job_id).items()
        for name, file in walk_files(url).items()
        if not name.startswith(CHECKPOINTS) and name != LEASE
    ]


def _modified(file: StoredFile) -> datetime | None:
    return utc_datetime_or_none(file.modified if math.isfinite(file.modified) else None)
