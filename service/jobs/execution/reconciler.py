"""Reconciler: moves every job, one step at a time, from its observed state to its desired state.

There are three sources of truth, in descending order of authority: the desired state in the database, the attempts'
reports under the storage root, and the submission status in Ray. The desired state is committed before Ray is called,
and every call to Ray may be repeated, so a control plane may die at any point and another can continue.
`service.jobs.actions` decides which actions an owner may take, and `admission` decides which job starts next. A storage
root or a cluster that hangs costs one timeout per step, not one per job. Does not use HTTP or import the encoder
registry.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

from amd.storage import StorageError, write_json
from service.auth.uri_policy import UriPolicy
from service.background import StepMonitor
from service.db.leases import LeaseKeeper, run_steps
from service.db.models import Job
from service.jobs.actions import STOP_GRACE_S, checkpoint_deadline_s
from service.jobs.execution.admission import AdmissionController, ExternalUsage
from service.jobs.execution.backfill import Usage
from service.jobs.execution.committed import committed_work, has_grown
from service.jobs.execution.deletion import JobDeletions
from service.jobs.execution.protocol import AttemptOutcome, DriverPolicy, Heartbeat, JobFolder, request_digest
from service.jobs.execution.queue import JobQueue
from service.jobs.execution.ray_jobs import Capacity, Cluster, OnceSilentCluster, RayJobStatus
from service.jobs.execution.scheduling import Schedule, schedule
from service.jobs.execution.transitions import BACKOFF_S, backoff_s, next_transition, outcome_of_lost
from service.jobs.schemas import ACTIVE, ENDED
from service.jobs.store import JobStore, StaleJob
from service.logs import log_context
from service.projects.accounts import AccountReader
from service.projects.store import ProjectStore
from service.settings import Settings
from service.web.bounded_calls import BoundedCalls
from service.web.errors import ClusterUnavailable, StorageUnavailable

logger = logging.getLogger(__name__)

TASK = "reconciler"
STORAGE_THREADS, STORAGE_TIMEOUT_S = 16, 10.0
STOPPING = ("pausing", "cancelling")
ENDED_SILENCE_S = 20.0  # after Ray reports the end, because the attempt's own report may still arrive
STOP_AGAIN_S = 10.0
MAX_MARKED = 10  # number of waiting jobs whose message reports an outage


class PublishedEncoders(Protocol):
    """Interface through which jobs use the encoder registry."""

    def register(self, folder: str) -> None:
        """Register the encoder that a job has just published in this folder. May raise StorageError."""


class Reconciler:
    """Moves every job, one step at a time, towards its desired state. Only the replica that holds the lease does so."""

    def __init__(
        self,
        store: JobStore,
        cluster: Cluster,
        settings: Settings,
        encoders: PublishedEncoders,
        clock: Callable[[], float] = time.time,
        reserved: Callable[[], Usage] = Usage,
        deployed_gpus: Callable[[], Mapping[str, float]] = dict[str, float],
    ) -> None:
        """`reserved` returns the resources that deployments reserve on the cluster, which jobs cannot use.

        `deployed_gpus` returns the number of GPUs that each project's deployments use at their maximum replicas.
        """
        self._store, self._settings, self._encoders = store, settings, encoders
        self._cluster = OnceSilentCluster(cluster)
        self._storage = BoundedCalls("storage root", STORAGE_THREADS, STORAGE_TIMEOUT_S, StorageUnavailable)
        self._clock, self._reserved, self._deployed_gpus = clock, reserved, deployed_gpus
        self._root = settings.root
        self._allowed_uris = UriPolicy(self._root, settings.allowed_uris).allowed
        self._external_usage, self._queue = ExternalUsage(clock), JobQueue(store.engine)
        self._accounts, self._projects = AccountReader(store.engine), ProjectStore(store.engine)
        self._reserved_for: str | None = None  # the job for which the last step kept resources free
        self._deletions = JobDeletions(store, self._root)
        self.lease, self.monitor = LeaseKeeper(store.engine, TASK), StepMonitor(TASK)
        self._is_storage_out = False  # during this step
        self._silent_since: dict[str, float] = {}  # by job: when its attempt was first missing without an outcome
        self._heartbeats: dict[str, tuple[float, float]] = {}  # by missing job: (node's clock, when observed)
        self._stopped_at: dict[str, float] = {}
        self.outage = ""
        """Reason why the cluster does not respond; empty while it responds."""

    def run(self, stop: threading.Event) -> None:
        """Reconcile until `stop` is set. Any error is logged, and the next step retries."""
        run_steps(
            self.step,
            stop,
            self._settings.reconcile_s,
            self.lease,
            self.monitor,
            on_error=lambda _: logger.exception("reconcile step failed; will retry"),
        )
        self._deletions.close()
        self._storage.close()

    def step(self) -> bool:
        """Reconcile every job once. Returns whether this replica holds the lease."""
        if not self.lease.acquire():
            return False
        self._cluster.reset()
        self._is_storage_out = False
        active = self._store.in_states(ACTIVE)
        for job, heartbeat in zip(
            active, self._storage.map_from_thread(_read_heartbeat(self._root), active), strict=True
        ):
            if not self.lease.is_held:
                return False
            self._guarded(partial(self._follow, heartbeat=heartbeat), job)
        if not self._is_storage_out:  # starting a job writes its config
            self._start_waiting()
        self._deletions.advance()
        return True

    def _guarded(self, move: Callable[[Job], None], job: Job) -> None:
        """Reconcile one job. Errors do not affect other jobs."""
        with log_context(job=job.id, project=job.project):
            try:
                move(job)
                self.outage = ""
            except StaleJob:
                pass  # its owner changed it first; the next step reads the new version
            except ClusterUnavailable as error:
                self._note_outage(job, error.message)
            except StorageUnavailable as error:
                self._is_storage_out = True
                logger.warning("%s: %s", job.id, error.message)
            except StorageError as error:
                logger.warning("%s: %s", job.id, error)
            except Exception:
                logger.exception("%s: cannot be reconciled now; will retry", job.id)

    def _note_outage(self, job: Job, outage: str) -> None:
        if self.outage != outage:
            logger.warning("%s", outage)
            self.outage = outage
        if job.message != outage and job.state not in STOPPING:
            self._store.note_progress(job, job.progress, outage)

    # Active jobs

    def _follow(self, job: Job, heartbeat: Heartbeat | Exception | None) -> None:
        """Reconcile an active job. `heartbeat`: the newest heartbeat, or the error raised when reading it."""
        if isinstance(heartbeat, Exception):
            raise heartbeat
        if heartbeat is not None and heartbeat.outcome is not None:
            self._finish(job, heartbeat.outcome, self._stopped_through_ray(job, heartbeat.outcome))
            return
        ray_job = self._cluster.status(submission_id(job, job.attempt))
        if ray_job is None and heartbeat is None and job.state == "starting" and not self._start_timed_out(job):
            self._submit(job)  # the state was committed, but then the control plane died or Ray was unavailable
        elif ray_job is None or ray_job.ended:
            self._handle_missing(job, ray_job, heartbeat)
        else:
            self._silent_since.pop(job.id, None)
            self._update_running(job, heartbeat)

    def _update_running(self, job: Job, heartbeat: Heartbeat | None) -> None:
        if job.state == "starting" and heartbeat is not None:
            job = self._store.change(job, "running", state="running", message="", progress=heartbeat.progress)
        elif heartbeat is not None and (
            heartbeat.progress != job.progress or (job.message and job.state == "running")
        ):  # the message of a running job only reports cluster outages, and the cluster has just responded
            self._store.note_progress(job, heartbeat.progress, "" if job.state == "running" else None)
        if job.state == "running" and job.time_limit_s is not None and job.started_at is not None:
            over = self._clock() - job.started_at - job.time_limit_s
            if over > 0:
                message = f"time_limit_s={job.time_limit_s:g} has passed; saving a final checkpoint"
                stop_by = self._clock() + checkpoint_deadline_s(self._store.get(job.id)) + STOP_GRACE_S
                fields: dict[str, Any] = {
                    "state": "cancelling",
                    "wanted": "limit",
                    "message": message,
                    "stop_by": stop_by,
                }
                job = self._store.change(job, "time_limit", **fields)
        if job.state in STOPPING:
            self._request_stop(job)

    def _request_stop(self, job: Job) -> None:
        """Ask Ray to stop the attempt, repeating the request every STOP_AGAIN_S until the attempt has ended."""
        key = submission_id(job, job.attempt)
        if self._clock() - self._stopped_at.get(key, 0.0) >= STOP_AGAIN_S:
            if job.stop_by is not None:  # relative, because the node's clock may differ
                seconds = max(0.0, job.stop_by - self._clock())
                folder = JobFolder(self._root, job.id)
                self._storage.run_from_thread(folder.write_stop_deadline, job.attempt, seconds)
            self._cluster.stop(key)
            self._stopped_at[key] = self._clock()

    def _handle_missing(self, job: Job, ray_job: RayJobStatus | None, heartbeat: Heartbeat | None) -> None:
        """Handle an attempt that has not reported an outcome, although Ray reports it as ended or does not know it.

        The attempt is declared lost once it has sent no heartbeat for long enough. An attempt that sends heartbeats is
        alive, whatever Ray reports: when its head is replaced, Ray forgets jobs or marks running ones as failed.
        """
        now = self._clock()
        since = self._silent_since.setdefault(job.id, now)
        last_heartbeat = self._last_heartbeat(job, heartbeat, now)
        limit = self._settings.silence_s if ray_job is None else min(self._settings.silence_s, ENDED_SILENCE_S)
        if now - max(since, last_heartbeat) < limit:
            return
        del self._silent_since[job.id]
        self._finish(job, outcome_of_lost(job, ray_job, started=heartbeat is not None), stopped_through_ray=False)

    def _last_heartbeat(self, job: Job, heartbeat: Heartbeat | None, now: float) -> float:
        """Return the time at which the heartbeat last changed, on this machine's clock: node clocks may differ."""
        if heartbeat is None:
            return 0.0
        node_time, observed = self._heartbeats.get(job.id, (0.0, 0.0))
        if node_time != heartbeat.at:
            self._heartbeats[job.id] = (heartbeat.at, now)
            return now
        return observed

    def _start_timed_out(self, job: Job) -> bool:
        """Whether the start has timed out. Without this limit, an attempt that Ray keeps losing would never end."""
        return job.started_at is not None and self._clock() - job.started_at > self._settings.start_timeout_s

    def _stopped_through_ray(self, job: Job, outcome: AttemptOutcome) -> bool:
        """Whether the attempt was stopped through Ray by a user rather than by a node shutdown."""
        if outcome.state != "cancelled" or job.wanted != "run":
            return False
        try:
            ray_job = self._cluster.status(submission_id(job, job.attempt))
        except ClusterUnavailable:
            return False
        return ray_job is not None and ray_job.status == "STOPPED"

    # Ended attempts

    def _finish(self, job: Job, outcome: AttemptOutcome, stopped_through_ray: bool) -> None:
        """Move the job to the state that results from its attempt's outcome."""
        self._silent_since.pop(job.id, None)
        self._heartbeats.pop(job.id, None)
        now = self._clock()
        failures = 0
        if outcome.retryable:
            outcome = outcome.model_copy(update={"committed": self._committed_work(job)})
            failures = self._failures_without_progress(job, outcome)
        state, reason, message = next_transition(job, outcome, stopped_through_ray, failures)
        fields: dict[str, Any] = {"state": state, "reason": reason, "message": message, "stop_by": None}
        if state == "retrying":
            fields |= {"retries": failures, "not_before": now + backoff_s(failures - 1)}
        elif state == "queued":
            fields |= {"wanted": "run", "not_before": now + BACKOFF_S}
        elif state in ENDED:
            fields["ended_at"] = now
        if outcome.result is not None:
            fields["result"] = outcome.result
            if state == "succeeded" and outcome.result.get("encoder_folder"):
                self._register(outcome.result["encoder_folder"])
        attempt = {
            "state": outcome.state,
            "reason": outcome.reason,
            "message": outcome.message,
            "ended_at": outcome.ended or now,
            "outcome": outcome.model_dump(mode="json"),
        }
        self._store.change(job, state, attempt=attempt, **fields)

    def _committed_work(self, job: Job) -> dict[str, int]:
        return self._storage.run_from_thread(committed_work, self._root, job)

    def _failures_without_progress(self, job: Job, outcome: AttemptOutcome) -> int:
        """Return the number of failures, including this one, since the job last committed work."""
        if not job.retries:
            return 1
        failed = [attempt.outcome for attempt in self._store.attempts(job.id) if attempt.state == "failed"]
        before: dict[str, int] = (failed[-1] or {}).get("committed", {}) if failed else {}
        return 1 if has_grown(before, outcome.committed) else job.retries + 1

    def _register(self, encoder: str) -> None:
        """Register an encoder before its job succeeds, so that clients waiting for the job can then deploy it."""
        try:
            self._storage.run_from_thread(self._encoders.register, encoder)
        except (StorageError, StorageUnavailable) as error:
            logger.warning("%s is not registered yet; the next scan retries: %s", encoder, error)

    # Waiting jobs

    def _start_waiting(self) -> None:
        now, projects = self._clock(), self._queue.projects()
        if not projects:
            return
        try:
            capacity, reserved = self._cluster.capacity(), self._reserved()
        except ClusterUnavailable as error:
            first = chain.from_iterable(self._queue.waiting(project, now) for project in sorted(projects))
            for job in islice(first, MAX_MARKED):
                self._note_outage(job, error.message)
            return
        self.outage = ""
        admission = self._admission(capacity, reserved, now)
        queues = {
            project: self._queue.waiting(project, now, partial(admission.exclusions, project)) for project in projects
        }
        decided = schedule(queues, admission, self._reserved_for, self._settings.preemption)
        self._reserved_for = decided.reserved_for
        self._apply(decided, admission)

    def _admission(self, capacity: Capacity, reserved: Usage, now: float) -> AdmissionController:
        active = self._store.in_states(ACTIVE)
        available = capacity._replace(
            cpus=max(0.0, capacity.cpus - reserved.cpus), gpus=max(0.0, capacity.gpus - reserved.gpus)
        )
        accounts = self._accounts.read(now, self._deployed_gpus())
        admission = AdmissionController(self._settings, available, active, accounts, now)
        ours = admission.usage.plus(reserved)
        admission.exclude(self._external_usage.update(capacity, ours, active))
        return admission

    def _apply(self, decided: Schedule, admission: AdmissionController) -> None:
        for job, reason in decided.waits:
            if job.message != reason and job.state == "queued":
                self._store.note_progress(job, job.progress, reason)
        for job in decided.preempted:
            self._guarded(self._preempt, job)
        for job in decided.starts:
            if self._is_storage_out or not self.lease.is_held:
                return
            self._guarded(partial(self._start, reserved=admission.needs(job)), job)

    def _preempt(self, job: Job) -> None:
        """Stop a running job after a final checkpoint, so that it returns to the queue."""
        message = "preempted by a job of higher priority; saving a final checkpoint"
        stop_by = self._clock() + checkpoint_deadline_s(self._store.get(job.id)) + STOP_GRACE_S
        fields: dict[str, Any] = {"state": "pausing", "wanted": "preempt", "message": message, "stop_by": stop_by}
        self._request_stop(self._store.change(job, "preempt", **fields))

    def _start(self, job: Job, reserved: Usage) -> None:
        number, now = job.attempt + 1, self._clock()
        attempt = {
            "submission_id": submission_id(job, number),
            "started_at": now,
            "ended_at": None,
            "state": "running",
            "reason": None,
            "message": "",
            "outcome": None,
            "cpus": reserved.cpus,
            "gpus": reserved.gpus,
        }
        fields: dict[str, Any] = {"state": "starting", "message": "", "reason": None, "progress": None, "stop_by": None}
        fields |= {"started_at": now}
        self._submit(self._store.change(job, "starting", attempt=attempt, number=number, **fields))

    def _submit(self, job: Job) -> None:
        job = self._store.get(job.id)  # with its config
        self._storage.run_from_thread(_write_request, self._root, job)
        key, deadline_s = submission_id(job, job.attempt), checkpoint_deadline_s(job)
        policy = DriverPolicy(
            digest=request_digest(job.kind, job.config),
            allowed_uris=self._allowed_uris,
            credentials=self._projects.policy(job.project).credentials or {},
        )
        self._cluster.submit(key, job.id, job.attempt, self._root, deadline_s, policy)


def _read_heartbeat(root: str) -> Callable[[Job], Heartbeat | None]:
    return lambda job: JobFolder(root, job.id).read_heartbeat(job.attempt)


def _write_request(root: str, job: Job) -> None:
    folder = JobFolder(root, job.id)
    write_json(folder.request, {"kind": job.kind, "project": job.project})
    write_json(folder.config, job.config)


def submission_id(job: Job, attempt: int) -> str:
    """Return an attempt's Ray submission ID: the job's ID, with a numeric suffix from the second attempt on."""
    return job.id if attempt == 1 else f"{job.id}-{attempt}"
