"""Encoders that are to answer requests: what is wanted stands in the database, Ray Serve is brought to it.

A deployment is one application of Serve. An alias is followed: where it points, its replicas are told, without a new
process. Knows nothing of HTTP on either side.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, delete, or_, select, update
from sqlalchemy.orm import Session

from amd.artifacts.discovery import encoder_folder
from service.db.models import Deployment
from service.jobs.store import JobStore
from service.registry.store import EncoderStore
from service.serving.protocol import CANDIDATE, MAIN, SLOTS
from service.serving.schemas import ServingSettings
from service.serving.serve_api import Running, Serve
from service.settings import Settings
from service.web.errors import ClusterUnavailable, NotFound

logger = logging.getLogger(__name__)

TASK, HOLD_S = "deployer", 15.0
LOOK_S = 1.0
APP = "amd-"  # before a deployment's name: applications of others on the same cluster are left alone
STATES = {"RUNNING": "healthy", "UNHEALTHY": "unhealthy", "DEPLOY_FAILED": "failed"}
IN_FLIGHT = 1000  # requests of a replica: the engine's own queue says when there are too many
DRAIN_S = 30.0


class DeploymentStore:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    def put(self, wanted: Deployment) -> tuple[Deployment, bool]:
        """As it is now, and whether it is new. Raises NotFound where another project has that name."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            found = session.get(Deployment, wanted.name)
            if found is None:
                session.add(wanted)
                return wanted, True
            if found.project != wanted.project:
                raise NotFound(f"there is no deployment {wanted.name!r} in your project, and its name is taken")
            for field in ("encoder", "candidate", "share", "settings", "changed_at", "state", "message"):
                setattr(found, field, getattr(wanted, field))
            found.version += 1
            return found, False

    def all(self, project: str | None = None) -> Sequence[Deployment]:
        """Of a project, none: of all; by name."""
        query = select(Deployment).order_by(Deployment.name)
        if project is not None:
            query = query.where(Deployment.project == project)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def get(self, name: str, project: str | None) -> Deployment:
        """Raises NotFound."""
        with Session(self._reading, expire_on_commit=False) as session:
            found = session.get(Deployment, name)
        if found is None or project not in (None, found.project):
            raise NotFound(f"there is no deployment {name!r}")
        return found

    def serving(self, name: str, project: str | None) -> Deployment | None:
        """What answers for an encoder, named by its id, its alias, or its deployment; the healthiest, then by name."""
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

    def delete(self, name: str, project: str | None) -> None:
        """Raises NotFound."""
        found = self.get(name, project)
        with Session(self._engine) as session, session.begin():
            session.execute(delete(Deployment).where(Deployment.name == found.name))

    def note(self, seen: Deployment, state: str, message: str, serving: Mapping[str, str]) -> None:
        """What the deployer found; nothing where somebody has changed it meanwhile."""
        if (seen.state, seen.message, seen.serving) == (state, message, serving):
            return
        with Session(self._engine) as session, session.begin():
            session.execute(
                update(Deployment)
                .where(Deployment.name == seen.name, Deployment.version == seen.version)
                .values(state=state, message=message, serving=dict(serving))
            )


class Deployer:
    """Of several control planes, the holder of the lease brings Serve to what the database wants."""

    def __init__(
        self, store: DeploymentStore, encoders: EncoderStore, leases: JobStore, serve: Serve, settings: Settings
    ) -> None:
        self._store, self._encoders, self._leases, self._serve = store, encoders, leases, serve
        self._root, self._holder = settings.root, uuid.uuid4().hex
        self._told = ""

    def run(self, stop: threading.Event) -> None:
        """Until told to stop. Trouble of any kind is logged and met again at the next look."""
        while not stop.wait(LOOK_S):
            try:
                self.step()
                self._told = ""
            except ClusterUnavailable as error:
                if error.message != self._told:
                    logger.warning("%s", error.message)
                self._told = error.message
            except Exception:
                logger.exception("the deployer stumbled; it goes on")
        try:
            self._leases.let_go(TASK, self._holder)
        except Exception as error:
            logger.warning("the deployer's lease could not be given back: %s", error)

    def step(self) -> bool:
        """One look at everything; whether this replica holds the lease."""
        if not self._leases.hold(TASK, self._holder, HOLD_S):
            return False
        wanted = self._store.all()
        try:
            running = self._serve.applications()
        except ClusterUnavailable as error:
            for deployment in wanted:
                self._store.note(deployment, "unhealthy", error.message, deployment.serving)
            raise
        serving = {deployment.name: self._resolved(deployment) for deployment in wanted}
        apps = {APP + one.name: self._application(one, serving[one.name]) for one in wanted if serving[one.name]}
        ours = {name for name in running if name.startswith(APP)}
        changed = {name for name in ours | apps.keys() if not _is_told(apps.get(name), running.get(name))}
        if changed:
            others = [found.config for name, found in running.items() if name not in ours and found.config]
            self._serve.put([*others, *apps.values()])
        for deployment in wanted:
            name = APP + deployment.name
            found = None if name in changed else running.get(name)  # what was seen is from before the change
            state, message = self._state(deployment, serving[deployment.name], found)
            self._store.note(deployment, state, message, serving[deployment.name])
        return True

    def _resolved(self, deployment: Deployment) -> dict[str, str]:
        """Ids by slot; what has lost its meaning stays as it was."""
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
        # Every slot is named, an empty one too: of what Serve holds, only what is wanted is compared.
        urls = {slot: encoder_folder(self._root, serving[slot]) if slot in serving else None for slot in SLOTS}
        scale: dict[str, Any] = {"num_replicas": settings.replicas.min}
        if settings.replicas.min != settings.replicas.max:
            bounds = {"min_replicas": settings.replicas.min, "max_replicas": settings.replicas.max}
            scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": 8}}
        return {
            "name": APP + deployment.name,
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

    def _state(self, deployment: Deployment, serving: Mapping[str, str], found: Running | None) -> tuple[str, str]:
        if not serving:
            return "failed", f"there is no encoder or alias {deployment.encoder!r} in project {deployment.project}"
        if found is None:
            return "deploying", ""
        state = STATES.get(found.status, "deploying")
        return state, "" if state == "healthy" else found.message[:2000]


def _is_told(wanted: Mapping[str, Any] | None, running: Running | None) -> bool:
    return wanted is not None and running is not None and _holds(running.config, wanted)


def _holds(has: Any, wanted: Any) -> bool:
    """Whether all that is wanted is so: Serve adds fields of its own."""
    if isinstance(wanted, Mapping):
        return isinstance(has, Mapping) and all(_holds(has.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(has, list) and len(has) == len(wanted) and all(map(_holds, has, wanted))
    return bool(has == wanted)


def reserved_cpus(store: DeploymentStore) -> Callable[[], float]:
    """CPUs that deployments may take away from jobs."""

    def count() -> float:
        settings = [ServingSettings.model_validate(one.settings) for one in store.all()]
        return sum(one.cpus * one.replicas.max for one in settings)

    return count


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
        created_by=actor,
        created_at=now,
        changed_at=now,
        version=1,
    )
