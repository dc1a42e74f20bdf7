"""List and download the files that a job has written: reports, metrics, test results, Parquet files.

Paths start with the folder: `run/` for the run folder, without checkpoints, and `output/` for the output of a job such
as an embedding. Symbolic links are neither listed nor followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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

FOLDERS: dict[str, Callable[[str, str], str]] = {
    "run": run_folder,
    "output": lambda root, job_id: JobFolder(root, job_id).output,
}
MAX_ARTIFACTS = 10_000  # the listed ones; any can be downloaded
CHECKPOINTS = "checkpoints/"  # GET /v1/jobs/{id}/checkpoints lists them


def list_artifacts(root: str, job: Job) -> ArtifactList:
    """Return the files in path order. Raises StorageError."""
    views = [
        _view(f"{folder}/{name}", file) for folder in FOLDERS for name, file in _files(root, job.id, folder).items()
    ]
    found = sorted(views, key=lambda view: view.path)
    return ArtifactList(items=found[:MAX_ARTIFACTS], total=len(found), bytes=sum(view.bytes for view in found))


async def artifact_response(
    storage: BoundedCalls, root: str, job: Job, path: str, if_none_match: str | None
) -> Response:
    """Stream one file. Raises NotFound."""
    folder, _, name = path.partition("/")
    found = (await storage.run(_files, root, job.id, folder)).get(name) if folder in FOLDERS else None
    if found is None:
        raise NotFound(f"{job.id} has no artifact {path!r}; GET /v1/jobs/{job.id}/artifacts lists them")
    facts = FileFacts(found.size, f"{found.size}-{found.modified}")
    return await downloads.file_response(storage, FOLDERS[folder](root, job.id), name, facts, if_none_match)


def _files(root: str, job_id: str, folder: str) -> dict[str, StoredFile]:
    """Return the artifacts in one of FOLDERS, keyed by the path in it."""
    return {
        name: file
        for name, file in walk_files(FOLDERS[folder](root, job_id)).items()
        if not name.startswith(CHECKPOINTS) and name != LEASE
    }


def _view(path: str, file: StoredFile) -> ArtifactView:
    modified = file.modified if math.isfinite(file.modified) else None
    return ArtifactView(path=path, bytes=file.size, modified_at=utc_datetime_or_none(modified))
