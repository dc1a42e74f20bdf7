"""How a job moves: what its owner may ask, and a reconciler that brings the cluster to it. Decisions on one page each.

The database holds the intent, the storage root what attempts said of themselves, Ray what it believes; in this order
they outrank each other. An intent is committed before Ray is asked, and every question to Ray may be repeated, so a
control plane may die between any two lines here and another goes on.

    queued → starting → running → succeeded | failed | cancelled
    retrying (after a failure of machines) → starting      pausing → paused → queued      cancelling → cancelled
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from amd.storage import StorageError, write_json
from service.db.models import Job
from service.jobs.execution.external import Discovery
from service.jobs.execution.protocol import JobFolder, Outcome, Word
from service.jobs.execution.ray_jobs import Capacity, Cluster, Seen
from service.jobs.schemas import ACTIVE, ENDED, WAITING, Action
from service.jobs.store import JobStore, Stale
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from service.settings import Settings
from service.web.errors import ClusterUnavailable, IllegalAction

logger = logging.getLogger(__name__)

TASK, HOLD_S = "reconciler", 15.0
STOPPING = ("pausing", "cancelling")
ENDED_SILENCE_S = 20.0  # Ray says it has ended, and it has not said so itself: until then its word may still come
STOP_AGAIN_S = 10.0
STOP_GRACE_S = 30.0  # beyond checkpoint.deadline_s: workers are told, write, and report back
BACKOFF_S, BACKOFF_MOST_S = 5.0, 300.0

# What may be asked of a job, by its state.
ACTIONS: dict[str, tuple[Action, ...]] = {
    "queued": ("cancel", "pause"),
    "retrying": ("cancel", "pause"),
    "starting": ("cancel", "pause"),
    "running": ("cancel", "pause"),
    "pausing": ("cancel",),
    "paused": ("resume", "cancel"),
    "cancelling": (),
    "succeeded": ("delete",),
    "failed": ("retry", "delete"),
    "cancelled": ("retry", "delete"),
}


def allowed_actions(job: Job) -> list[Action]:
    if job.origin != "api":
        return []
    return list(ACTIONS[job.state])


def check_allowed(job: Job, action: Action) -> None:
    """Raises IllegalAction."""
    allowed = allowed_actions(job)
    if action not in allowed:
        remedy = f"; it allows {', '.join(allowed)}" if allowed else ""
        outside = " and was begun outside the service" if job.origin != "api" else ""
        raise IllegalAction(f"{action}: {job.id} is {job.state}{outside}{remedy}", allowed_actions=allowed)


def act(
    store: JobStore, job_id: str, project: str | None, action: Action, actor: str, deadline_s: float | None = None
) -> Job:
    """Do what a job's owner asks; what is already so, or under way, changes nothing. Raises IllegalAction, NotFound."""
    while True:
        job = store.get(job_id, project)
        if action in _UNDER_WAY.get(job.state, ()):
            return job
        check_allowed(job, action)
        try:
            return store.change(job, action, actor=actor, **_asked(job, action, deadline_s))
        except Stale:
            continue


_UNDER_WAY: dict[str, tuple[Action, ...]] = {
    "cancelled": ("cancel",),
    "cancelling": ("cancel",),
    "paused": ("pause",),
    "pausing": ("pause",),
}


# What is wanted then, and the job's state while it saves and once it has.
_STOPS: dict[Action, tuple[str, str, str]] = {
    "cancel": ("cancel", "cancelling", "cancelled"),
    "pause": ("pause", "pausing", "paused"),
}


def _asked(job: Job, action: Action, deadline_s: float | None) -> dict[str, Any]:
    """The fields that an action sets."""
    now = time.time()
    if action in ("resume", "retry"):
        begin = {"state": "queued", "wanted": "run", "retries": 0, "not_before": now, "stop_by": None}
        return {**begin, "reason": None, "message": "", "ended_at": None}
    wanted, going, gone = _STOPS[action]
    if job.state in ACTIVE:
        seconds = deadline_s if deadline_s is not None else own_deadline_s(job) + STOP_GRACE_S
        return {"wanted": wanted, "state": going, "stop_by": now + seconds, "message": "saving a last checkpoint"}
    fields: dict[str, Any] = {"wanted": wanted, "state": gone, "message": ""}
    return fields | ({"reason": "cancelled_by_user", "ended_at": now} if gone == "cancelled" else {})


def own_deadline_s(job: Job) -> float:
    """checkpoint.deadline_s of its config."""
    run = job.config.get("train") if job.kind == "search" else job.config
    checkpoint = run.get("checkpoint") if isinstance(run, dict) else None
    return float((checkpoint or {}).get("deadline_s", 60.0))


def submission_id(job: Job, attempt: int) -> str:
    """Ray's. The first attempt's is the job's id; Ray takes an id once."""
    return job.id if attempt == 1 else f"{job.id}-{attempt}"


class Reconciler:
    """Moves every job one step at a time towards what is wanted. Of several replicas, the holder of the lease does."""

    def __init__(
        self,
        store: JobStore,
        cluster: Cluster,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        reserved: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`reserved`: CPUs of the cluster that are not for jobs."""
        self._reserved = reserved
        self._store, self._cluster, self._settings, self._clock = store, cluster, settings, clock
        self._root = settings.root
        self._discovery = Discovery(store, self._root)
        self._encoders = EncoderDiscovery(EncoderStore(store.engine), self._root)
        self.holder = uuid.uuid4().hex
        self._silent_since: dict[str, float] = {}  # attempts whose end nobody has told yet
        self._signs: dict[str, tuple[float, float]] = {}  # of those: the last by their clock, and when it was seen
        self._stopped_at: dict[str, float] = {}
        self.trouble = ""
        """Why the cluster does not answer; empty while it does."""

    def run(self, stop: threading.Event) -> None:
        """Until told to stop. Trouble of any kind is logged and met again at the next look."""
        while not stop.wait(self._settings.reconcile_s):
            try:
                self.step()
            except Exception:
                logger.exception("the reconciler stumbled; it goes on")
        try:
            self._store.let_go(TASK, self.holder)
        except Exception as error:
            logger.warning("the reconciler's lease could not be given back: %s", error)

    def step(self) -> bool:
        """One look at everything; whether this replica holds the lease."""
        if not self._store.hold(TASK, self.holder, HOLD_S):
            return False
        for job in self._store.in_states(ACTIVE):
            self._carefully(self._follow, job)
        self._start_waiting()
        for what, look in (("runs from outside", self._discovery.look), ("encoders", self._encoders.look)):
            try:
                look()
            except StorageError as error:
                logger.warning("%s cannot be looked for: %s", what, error)
        return True

    def _carefully(self, move: Callable[[Job], None], job: Job) -> None:
        """What goes wrong with one job is no matter of the others."""
        try:
            move(job)
            self.trouble = ""
        except Stale:
            pass  # its owner was first; the next look sees it
        except ClusterUnavailable as error:
            self._told(job, error.message)
        except StorageError as error:
            logger.warning("%s: %s", job.id, error)
        except Exception:
            logger.exception("%s: cannot be moved now", job.id)

    def _told(self, job: Job, trouble: str) -> None:
        if self.trouble != trouble:
            logger.warning("%s", trouble)
            self.trouble = trouble
        if job.message != trouble and job.state not in STOPPING:
            self._store.note_progress(job, job.progress, trouble)

    # A job that is under way

    def _follow(self, job: Job) -> None:
        word = JobFolder(self._root, job.id).hear(job.attempt)
        if word is not None and word.outcome is not None:
            self._finish(job, word.outcome, self._asked_ray_to_stop(job, word.outcome))
            return
        seen = self._cluster.look(submission_id(job, job.attempt))
        if seen is None and word is None and job.state == "starting" and not self._waited(job):
            self._submit(job)  # the intent was committed, and then the control plane died, or Ray was away
        elif seen is None or seen.ended:
            self._missing(job, seen, word)
        else:
            self._silent_since.pop(job.id, None)
            self._alive(job, word)

    def _alive(self, job: Job, word: Word | None) -> None:
        if job.state == "starting" and word is not None:
            job = self._store.change(job, "running", state="running", message="", progress=word.progress)
        elif word is not None and (word.progress != job.progress or (job.message and job.state == "running")):
            # All that a running job is told is trouble with the cluster, which has just answered.
            self._store.note_progress(job, word.progress, "" if job.state == "running" else None)
        if job.state == "running" and job.time_limit_s is not None and job.started_at is not None:
            over = self._clock() - job.started_at - job.time_limit_s
            if over > 0:
                message = f"time_limit_s={job.time_limit_s:g} is over; saving a last checkpoint"
                job = self._store.change(
                    job, "time_limit", state="cancelling", wanted="limit", message=message,
                    stop_by=self._clock() + own_deadline_s(self._store.get(job.id)) + STOP_GRACE_S,
                )  # fmt: skip
        if job.state in STOPPING:
            key = submission_id(job, job.attempt)
            if self._clock() - self._stopped_at.get(key, 0.0) >= STOP_AGAIN_S:
                if job.stop_by is not None:  # relative: the node's clock is another
                    JobFolder(self._root, job.id).limit_stop(job.attempt, max(0.0, job.stop_by - self._clock()))
                self._cluster.stop(key)
                self._stopped_at[key] = self._clock()

    def _missing(self, job: Job, seen: Seen | None, word: Word | None) -> None:
        """Ray says it has ended, or knows nothing of it, but the attempt itself has not said so.

        A head that was replaced forgets its jobs, or calls those failed that go on: while an attempt gives signs of
        life it lives. One that is silent for a while is lost.
        """
        now = self._clock()
        since = self._silent_since.setdefault(job.id, now)
        heard = self._heard(job, word, now)
        patience = self._settings.silence_s if seen is None else min(self._settings.silence_s, ENDED_SILENCE_S)
        if now - max(since, heard) < patience:
            return
        del self._silent_since[job.id]
        asked = job.wanted != "run"
        if asked:
            message = "ended without a last word: its newest checkpoint is what it left"
            lost = Outcome(state="cancelled", reason="deadline_exceeded", message=message)
        elif seen is not None and seen.status == "STOPPED":
            lost = Outcome(
                state="cancelled", reason="cancelled_by_user", message="stopped through Ray, not the service"
            )
        else:
            said = [line for line in seen.message.splitlines() if line.strip()] if seen is not None else []
            if seen is None:
                message = "the cluster has lost it"
            elif word is None:  # the last line of a traceback is the one that tells
                message = f"its driver could not start: {said[-1][:300] if said else 'Ray does not say why'}"
            else:
                message = "its driver ended without a word" + (f"; Ray says: {said[0][:300]}" if said else "")
            lost = Outcome(
                state="failed", reason="node_lost", message=message, log_tail=seen.message if seen is not None else ""
            )
        self._finish(job, lost, by_ray=False)

    def _heard(self, job: Job, word: Word | None, now: float) -> float:
        """When the attempt last gave a sign of life, by this clock: nodes' clocks differ, so only changes count."""
        if word is None:
            return 0.0
        said, heard = self._signs.get(job.id, (0.0, 0.0))
        if said != word.at:
            self._signs[job.id] = (word.at, now)
            return now
        return heard

    def _waited(self, job: Job) -> bool:
        """Whether Ray has had its time: what it took and then lost is not begun anew for ever."""
        return job.started_at is not None and self._clock() - job.started_at > self._settings.start_timeout_s

    def _asked_ray_to_stop(self, job: Job, outcome: Outcome) -> bool:
        """Whether a person stopped the attempt through Ray, rather than its node going away."""
        if outcome.state != "cancelled" or job.wanted != "run":
            return False
        try:
            seen = self._cluster.look(submission_id(job, job.attempt))
        except ClusterUnavailable:
            return False
        return seen is not None and seen.status == "STOPPED"

    # Ends

    def _finish(self, job: Job, outcome: Outcome, by_ray: bool) -> None:
        """From an attempt's outcome to the job's next state."""
        self._silent_since.pop(job.id, None)
        self._signs.pop(job.id, None)
        now = self._clock()
        state, reason, message = self._verdict(job, outcome, by_ray)
        fields: dict[str, Any] = {"state": state, "reason": reason, "message": message, "stop_by": None}
        if state == "retrying":
            fields |= {"retries": job.retries + 1, "not_before": now + backoff_s(job.retries)}
        elif state == "queued":
            fields |= {"not_before": now + BACKOFF_S}
        elif state in ENDED:
            fields["ended_at"] = now
        if outcome.result is not None:
            fields["result"] = outcome.result
            if state == "succeeded" and outcome.result.get("encoder_folder"):
                self._published(outcome.result["encoder_folder"])
        attempt = {
            "state": outcome.state,
            "reason": outcome.reason,
            "message": outcome.message,
            "ended_at": outcome.ended or now,
            "outcome": outcome.model_dump(mode="json"),
        }
        self._store.change(job, state, attempt=attempt, **fields)

    def _published(self, encoder: str) -> None:
        """Known before its job has succeeded: who waited for that may deploy it at once."""
        try:
            self._encoders.published(encoder)
        except StorageError as error:
            logger.warning("%s is not shown yet: %s", encoder, error)  # the next look finds it

    def _verdict(self, job: Job, outcome: Outcome, by_ray: bool) -> tuple[str, str | None, str]:
        """State, reason and message that follow from an outcome and what was wanted."""
        if outcome.state == "succeeded":
            return "succeeded", None, outcome.message
        if job.wanted == "cancel":
            reason = outcome.reason if outcome.reason == "deadline_exceeded" else "cancelled_by_user"
            return "cancelled", reason, outcome.message
        if job.wanted == "pause" and (outcome.state == "cancelled" or outcome.retryable):
            return "paused", None, outcome.message
        if job.wanted == "limit":
            return "failed", "time_limit", f"time_limit_s={job.time_limit_s:g} is over. {outcome.message}".strip()
        if outcome.state == "cancelled":
            if outcome.asked_to_stop and outcome.reason == "cancelled_by_user" and not by_ray:
                return "queued", None, "its node went away; going on from the newest checkpoint"
            return "cancelled", outcome.reason, outcome.message
        if outcome.retryable and job.retries < job.max_retries:
            message = f"retry {job.retries + 1} of {job.max_retries} after: {outcome.message}"
            return "retrying", outcome.reason, message
        return "failed", outcome.reason or "unknown", outcome.message

    # Those that wait

    def _start_waiting(self) -> None:
        waiting = [job for job in self._store.in_states(WAITING) if job.not_before <= self._clock()]
        if not waiting:
            return
        try:
            capacity = self._cluster.capacity()
            capacity = capacity._replace(cpus=max(0.0, capacity.cpus - self._reserved()))
        except ClusterUnavailable as error:
            for job in waiting[:10]:
                self._told(job, error.message)
            return
        self.trouble = ""
        room = Room(self._settings, capacity, self._store.in_states(ACTIVE))
        for job in waiting:
            obstacle = room.obstacle(job)
            if obstacle is None:
                room.take(job)
                self._carefully(self._begin, job)
            elif job.message != obstacle and job.state == "queued":
                self._store.note_progress(job, job.progress, obstacle)
            if room.full:
                return

    def _begin(self, job: Job) -> None:
        number, now = job.attempt + 1, self._clock()
        begun = {
            "submission_id": submission_id(job, number),
            "started_at": now,
            "ended_at": None,
            "state": "running",
            "reason": None,
            "message": "",
            "outcome": None,
        }
        fields: dict[str, Any] = {"state": "starting", "message": "", "reason": None, "progress": None, "stop_by": None}
        fields |= {"started_at": now}
        self._submit(self._store.change(job, "starting", attempt=begun, number=number, **fields))

    def _submit(self, job: Job) -> None:
        job = self._store.get(job.id)  # whole
        folder = JobFolder(self._root, job.id)
        write_json(folder.request, {"kind": job.kind})
        write_json(folder.config, job.config)
        self._cluster.submit(submission_id(job, job.attempt), job.id, job.attempt, self._root, own_deadline_s(job))


class Room:
    """What may still start: the cluster's resources, and limits of jobs and workers. Never overtakes what could fit."""

    def __init__(self, settings: Settings, capacity: Capacity, active: Any) -> None:
        self._settings, self._capacity = settings, capacity
        self._cpus = self._gpus = 0.0
        self._running = 0
        self._jobs: Counter[str] = Counter()
        self._workers: Counter[str] = Counter()
        self.full = False
        """Whether nothing else is to start now."""
        for job in active:
            self.take(job)

    def take(self, job: Job) -> None:
        self._running += 1
        self._jobs[job.project] += 1
        self._workers[job.project] += job.workers
        self._cpus += job.cpus
        self._gpus += self._gpus_of(job)
        self.full = self.full or self._running >= self._settings.max_running

    def obstacle(self, job: Job) -> str | None:
        """What a job waits for; None: it may start."""
        most, workers = self._settings.project_max_running, self._settings.project_max_workers
        if self.full:
            return f"waits for one of {self._settings.max_running} running jobs to end"
        if most is not None and self._jobs[job.project] >= most:
            return f"waits: project {job.project} runs {most} jobs, which is its limit"
        if workers is not None and self._workers[job.project] + job.workers > workers:
            return f"waits: project {job.project} may have {workers} workers, of which {job.workers} must be free"
        if self._settings.autoscaling:
            return None
        has, gpus = self._capacity, self._gpus_of(job)
        asks = f"{job.cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        if job.cpus > has.cpus or gpus > has.gpus:
            return f"waits: it needs {asks}, and the cluster has {has.cpus:g} CPUs and {has.gpus:g} GPUs in all"
        if self._cpus + job.cpus > has.cpus or self._gpus + gpus > has.gpus:
            self.full = True  # what waits behind it would overtake it for ever
            return f"waits for {asks} to be free"
        return None

    def _gpus_of(self, job: Job) -> float:
        wants = job.device == "cuda" or (job.device == "auto" and self._capacity.gpus >= job.workers)
        return float(job.workers) if wants else 0.0


def backoff_s(retries: int) -> float:
    """5, 10, 20 … s, at most five minutes."""
    return float(min(BACKOFF_MOST_S, BACKOFF_S * 2**retries))
