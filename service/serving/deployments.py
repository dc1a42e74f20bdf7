"""Deployments: desired state is stored in the database; the deployer applies it to Ray Serve.

A deployment is one Serve application. It follows an alias without restarting replicas.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import Engine, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from amd.artifacts.discovery import encoder_folder
from service.background import StepMonitor
from service.db.audit import record_change
from service.db.leases import LeaseKeeper, run_steps
from service.db.models import Deletion, Deployment, DeploymentRevision
from service.registry.store import EncoderStore
from service.serving.protocol import CANDIDATE, MAIN, SLOTS
from service.serving.revisions import add_revision, newest_first
from service.serving.schemas import ServingSettings
from service.serving.serve_api import ServeApplication, ServeClient
from service.settings import Settings
from service.web.errors import ClusterUnavailable, NotFound
from service.web.preconditions import check_match

logger = logging.getLogger(__name__)

TASK = "deployer"
POLL_INTERVAL_S = 1.0
LOAD_CHECK_S = 15.0  # between checks that a healthy deployment's replicas have loaded their encoders
APP_PREFIX = "amd-"  # prefix of our applications; others on the cluster are left unchanged
STATE_BY_STATUS = {"RUNNING": "healthy", "UNHEALTHY": "unhealthy", "DEPLOY_FAILED": "failed"}
MESSAGE_CHARS = 2000
IN_FLIGHT = 1000  # requests per replica; high, because the engine limits its own queue
DRAIN_S = 30.0


class DeploymentStore:
    """Deployments in the database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    def put(
        self,
        desired: Deployment,
        if_match: str | None = None,
        check: Callable[[Session, Deployment], None] = lambda session, desired: None,
        resolved: Mapping[str, str] = MappingProxyType({}),
        restored: int | None = None,
    ) -> tuple[Deployment, bool]:
        """Create or update a deployment. Returns the deployment and whether it is new.

        `check` is called within the transaction and may raise an error. `resolved`: IDs of the desired encoders by
        slot. `restored`: number of the revision that a rollback restores; the deployment must then exist.

        Raises NotFound if the name belongs to another project, or PreconditionFailed if `if_match` does not match the
        ETag of the current settings.
        """
        while True:
            try:
                with Session(self._engine, expire_on_commit=False) as session, session.begin():
                    check(session, desired)
                    stored, outcome = self._put(session, desired, if_match, restored)
                    add_revision(session, stored, desired.created_by, resolved, restored)
                    record_change(session, desired.created_by, "deployment.put", stored.name, stored.project, outcome)
                    return stored, stored is desired
            except IntegrityError:  # created concurrently
                continue

    def _put(
        self, session: Session, desired: Deployment, if_match: str | None, restored: int | None
    ) -> tuple[Deployment, str]:
        """Create or update a deployment. Returns the deployment and the outcome for the audit log."""
        # `check` may have read the deployment before it was locked.
        found = session.get(Deployment, desired.name, with_for_update=True, populate_existing=True)
        if found is None:
            if restored is not None:
                raise _not_found(desired.name)
            check_match(if_match, None)
            session.add(desired)
            session.flush()  # so that one of two concurrent creations fails here
            return desired, "created"
        if found.project != desired.project:
            raise NotFound(
                f"deployment {desired.name!r} is not in your project, and another project uses the name; "
                "choose a different name"
            )
        check_match(if_match, etag_of(found))
        for field in ("encoder", "candidate", "share", "settings", "changed_at", "state", "message"):
            setattr(found, field, getattr(desired, field))
        found.version += 1
        return found, "updated" if restored is None else f"rolled back to revision {restored}"

    def all(self, project: str | None = None) -> Sequence[Deployment]:
        """Return the deployments of a project, or of all projects, sorted by name."""
        query = select(Deployment).order_by(Deployment.name)
        if project is not None:
            query = query.where(Deployment.project == project)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def applications(self) -> dict[str, Deployment]:
        """Return all deployments, keyed by the name of their Serve application."""
        return {APP_PREFIX + one.name: one for one in self.all()}

    def get(self, name: str, project: str | None) -> Deployment:
        """Get a deployment by name. Raises NotFound."""
        with Session(self._reading, expire_on_commit=False) as session:
            return _visible(session.get(Deployment, name), name, project)

    def revisions(self, name: str, project: str | None) -> Sequence[DeploymentRevision]:
        """Return the revisions of a deployment, newest first. Raises NotFound if there is no such deployment."""
        query = newest_first(name)
        if project is not None:  # checked again, since another project may take the name between the two queries
            query = query.join(Deployment).where(Deployment.project == project)
        with Session(self._reading, expire_on_commit=False) as session:
            _visible(session.get(Deployment, name), name, project)
            return list(session.scalars(query))

    def revision(self, name: str, project: str | None, number: int) -> DeploymentRevision:
        """Get a revision of a deployment by its number. Raises NotFound."""
        for found in self.revisions(name, project):
            if found.number == number:
                return found
        raise NotFound(f"revision={number}: deployment {name!r} has no such revision; list its revisions to choose one")

    def find_serving(self, name: str, project: str | None) -> Deployment | None:
        """Find a deployment by its name, or by its encoder's ID or alias.

        If several match, returns the healthiest, or the first by name if they are equally healthy.
        """
        query = select(Deployment).where(
            or_(
                Deployment.name == name,
                Deployment.encoder == name,
                Deployment.serving[MAIN].as_string() == name,
            )
        )
        if project is not None:
            query = query.where(Deployment.project == project)
        with Session(self._reading, expire_on_commit=False) as session:
            found = list(session.scalars(query))
        ranks = ("healthy", "unhealthy", "deploying", "failed")
        return min(found, key=lambda one: (ranks.index(one.state), one.name), default=None)

    def delete(self, name: str, project: str | None, actor: str, if_match: str | None = None) -> None:
        """Delete a deployment, which the deployer then stops. Raises NotFound, or PreconditionFailed like `put`."""
        with Session(self._engine) as session, session.begin():
            found = _visible(session.get(Deployment, name, with_for_update=True), name, project)
            check_match(if_match, etag_of(found))
            session.delete(found)
            now = time.time()
            row = Deletion(kind="deployment", object_id=name, project=found.project, actor=actor, at=now, done_at=now)
            session.add(row)
            record_change(session, actor, "deployment.delete", name, found.project, "deleted")

    def record_status(
        self, deployment: Deployment, state: str, message: str, serving: Mapping[str, str], replicas: int | None = None
    ) -> None:
        """Store the observed status, unless the deployment has changed in the meantime.

        `replicas`: number of replicas that hold resources; None leaves the stored number unchanged.
        """
        replicas = deployment.replicas if replicas is None else replicas
        known = (deployment.state, deployment.message, deployment.serving, deployment.replicas)
        if known == (state, message, serving, replicas):
            return
        with Session(self._engine) as session, session.begin():
            session.execute(
                update(Deployment)
                .where(Deployment.name == deployment.name, Deployment.version == deployment.version)
                .values(state=state, message=message, serving=dict(serving), replicas=replicas)
            )


def etag_of(deployment: Deployment) -> str:
    """Return the ETag of a deployment's settings, which does not depend on its observed state."""
    return f'"{deployment.version}-{int(deployment.created_at * 1e6):x}"'


def _visible(found: Deployment | None, name: str, project: str | None) -> Deployment:
    """Return the deployment. Raises NotFound if there is none, or if it belongs to another project."""
    if found is None or project not in (None, found.project):
        raise _not_found(name)
    return found


def _not_found(name: str) -> NotFound:
    return NotFound(f"there is no deployment {name!r}")


class Deployer:
    """Applies the deployments in the database to Serve. Only the control plane that holds the lease acts."""

    def __init__(
        self,
        store: DeploymentStore,
        encoders: EncoderStore,
        lease: LeaseKeeper,
        serve: ServeClient,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._encoders, self.lease, self._serve = store, encoders, lease, serve
        self._root, self.monitor = settings.root, StepMonitor(TASK)
        self._last_warning = ""
        self._clock, self._asked_at = clock, dict[str, float]()

    def run(self, stop: threading.Event) -> None:
        """Reconcile periodically until `stop` is set. Errors are logged, and the step is retried."""
        run_steps(self._warned_step, stop, POLL_INTERVAL_S, self.lease, self.monitor, self._log_error)

    def _warned_step(self) -> bool:
        """Perform a step. If it succeeds, the next outage is logged even if its message is the same."""
        has_lease = self.step()
        self._last_warning = ""
        return has_lease

    def _log_error(self, error: Exception) -> None:
        """Log an error raised by a step. A cluster outage is logged only once."""
        if not isinstance(error, ClusterUnavailable):
            logger.exception("deployer step failed; will retry")
            return
        if error.message != self._last_warning:
            logger.warning("%s", error.message)
        self._last_warning = error.message

    def step(self) -> bool:
        """Reconcile all deployments once. Returns whether this process holds the lease."""
        if not self.lease.acquire():
            return False
        desired = self._store.all()
        try:
            running = self._serve.applications()
        except ClusterUnavailable as error:
            for deployment in desired:
                self._store.record_status(deployment, "unhealthy", error.message, deployment.serving)
            raise
        serving = {deployment.name: self._resolve_slots(deployment) for deployment in desired}
        apps = {
            APP_PREFIX + one.name: self._application(one, serving[one.name]) for one in desired if serving[one.name]
        }
        ours = {name for name in running if name.startswith(APP_PREFIX)}
        changed = {name for name in ours | apps.keys() if not _is_up_to_date(apps.get(name), running.get(name))}
        if changed:
            others = [found.config for name, found in running.items() if name not in ours and found.config]
            self._serve.put([*others, *apps.values()])
        for deployment in desired:
            name = APP_PREFIX + deployment.name
            found = None if name in changed else running.get(name)  # the reported status predates the change
            state, message = self._state(deployment, serving[deployment.name], found)
            replicas = found.replicas if found is not None else None
            if state == "healthy" and replicas:
                state, message = self._loaded_state(deployment, serving[deployment.name])
            self._store.record_status(deployment, state, message, serving[deployment.name], replicas)
        return True

    def _loaded_state(self, deployment: Deployment, serving: Mapping[str, str]) -> tuple[str, str]:
        """Return the state of running replicas, which keep the previous encoder if the new one cannot be loaded."""
        known = (deployment.state, deployment.message)
        was_healthy = known == ("healthy", "") and deployment.serving == serving
        if was_healthy and self._clock() - self._asked_at.get(deployment.name, float("-inf")) < LOAD_CHECK_S:
            return known
        try:
            errors = self._serve.load_errors(deployment.name)
        except ClusterUnavailable:
            return "healthy", ""  # according to Serve
        self._asked_at[deployment.name] = self._clock()
        found = [f"{serving.get(slot, slot)} cannot be loaded: {error}" for slot, error in sorted(errors.items())]
        return (
            ("unhealthy", f"{'; '.join(found)}; the previous encoder serves instead"[:2000])
            if found
            else ("healthy", "")
        )

    def _resolve_slots(self, deployment: Deployment) -> dict[str, str]:
        """Return encoder IDs by slot. A slot whose name no longer resolves keeps its previous encoder."""
        found = dict[str, str]()
        for slot, name in ((MAIN, deployment.encoder), (CANDIDATE, deployment.candidate)):
            if name is None:
                continue
            try:
                found[slot] = self._encoders.resolve(name, deployment.project).id
            except NotFound:
                if slot in deployment.serving:
                    found[slot] = deployment.serving[slot]
        return found if MAIN in found else {}

    def _application(self, deployment: Deployment, serving: Mapping[str, str]) -> dict[str, Any]:
        settings = ServingSettings.model_validate(deployment.settings)
        # Include empty slots: `_matches` compares only the keys of the desired configuration.
        urls = {slot: encoder_folder(self._root, serving[slot]) if slot in serving else None for slot in SLOTS}
        scale: dict[str, Any] = {"num_replicas": settings.replicas.min}
        if settings.replicas.min != settings.replicas.max:
            most = max(settings.replicas.min, settings.replicas.max)  # stored before min <= max was required
            bounds = {"min_replicas": settings.replicas.min, "max_replicas": most}
            scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": 8}}
        return {
            "name": APP_PREFIX + deployment.name,
            "route_prefix": f"/{deployment.name}",
            "import_path": "service.serve:app",
            "args": {"engine": settings.engine()},
            "deployments": [
                {
                    "name": "Replica",
                    **scale,
                    "user_config": urls,
                    "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
                    "max_ongoing_requests": IN_FLIGHT,
                    "graceful_shutdown_timeout_s": DRAIN_S,
                    "health_check_period_s": 5.0,
                }
            ],
        }

    def _state(
        self, deployment: Deployment, serving: Mapping[str, str], found: ServeApplication | None
    ) -> tuple[str, str]:
        if not serving:
            return "failed", f"there is no encoder or alias {deployment.encoder!r} in project {deployment.project}"
        if found is None:
            return "deploying", ""
        state = STATE_BY_STATUS.get(found.status, "deploying")
        return state, "" if state == "healthy" else found.message[:MESSAGE_CHARS]


def _is_up_to_date(desired: Mapping[str, Any] | None, running: ServeApplication | None) -> bool:
    return desired is not None and running is not None and _matches(running.config, desired)


def _matches(has: Any, desired: Any) -> bool:
    """Return whether `has` contains all desired values; Serve may add other fields."""
    if isinstance(desired, Mapping):
        return isinstance(has, Mapping) and all(_matches(has.get(key), value) for key, value in desired.items())
    if isinstance(desired, list):
        return isinstance(has, list) and len(has) == len(desired) and all(map(_matches, has, desired))
    return bool(has == desired)


def new_deployment(
    name: str, project: str, actor: str, *, encoder: str, candidate: str | None, share: float, settings: ServingSettings
) -> Deployment:
    now = time.time()
    return Deployment(
        name=name,
        project=project,
        encoder=encoder,
        candidate=candidate,
        share=share if candidate is not None else 0.0,
        settings=settings.model_dump(mode="json"),
        serving={},
        state="deploying",
        message="",
        replicas=0,
        created_by=actor,
        created_at=now,
        changed_at=now,
        version=1,
    )
