"""Delete jobs: remove the files of jobs in the state `deleting`, then mark the jobs as deleted.

A job whose deletion was requested allows no other action, so nothing restarts it while its files are being removed.
Every step can be repeated safely: if a control plane dies midway, the job stays `deleting`, and the next control plane
continues.
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor

from amd.storage import join, listdir, remove
from amd.training.run_folder import run_folder
from service.db.models import Job
from service.jobs.execution.protocol import JobFolder
from service.jobs.store import JobStore, StaleJob
from tune_spaces.ledger import sweep_of

logger = logging.getLogger(__name__)

MAX_DELETIONS = 100  # considered at a time; the others follow


class JobDeletions:
    """Removes the files of deleted jobs in a separate thread, so that a large run does not delay other jobs."""

    def __init__(self, store: JobStore, root: str) -> None:
        self._store, self._root = store, root
        self._remover = ThreadPoolExecutor(1, "job-deletion")
        self._removals: dict[str, Future[None]] = {}

    def advance(self) -> None:
        """Start requested deletions, and record completed ones. Failed deletions are retried."""
        deleting = {job.id: job for job in self._store.in_states(("deleting",), limit=MAX_DELETIONS)}
        for job_id in self._removals.keys() - deleting.keys():  # completed by another control plane
            self._removals.pop(job_id).cancel()
        for job_id, job in deleting.items():
            removal = self._removals.get(job_id)
            if removal is None:
                self._removals[job_id] = self._remover.submit(remove_files, self._root, job)
            elif removal.done():
                del self._removals[job_id]
                self._record(job, removal.exception())

    def _record(self, job: Job, error: BaseException | None) -> None:
        if error is not None:
            logger.warning("%s: its files cannot be removed now; will retry: %s", job.id, error)
            return
        with contextlib.suppress(StaleJob):  # completed by another control plane
            self._store.finish_deletion(job)

    def close(self) -> None:
        """Cancel removals that have not started; the next control plane performs them."""
        self._remover.shutdown(wait=False, cancel_futures=True)


def remove_files(root: str, job: Job) -> None:
    """Remove a job's run with its checkpoints, the runs of a sweep's trials, and the job's log and output.

    Encoders that it published are kept. Raises StorageError.
    """
    # Found by name, because the job itself writes the sweep's ledger, which must not determine what is removed.
    runs = listdir(join(root, "runs")) if job.kind == "search" else []
    for name in runs:
        if sweep_of(name) == job.id:
            remove(run_folder(root, name))
    remove(run_folder(root, job.id))
    remove(JobFolder(root, job.id).url)
