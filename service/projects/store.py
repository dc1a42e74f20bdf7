"""Project scheduling policies in the database. A project without a stored policy has the default policy."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.audit import record_change
from service.db.models import ProjectSettings
from service.projects.schemas import ProjectPolicy
from service.web.errors import NotFound, QuotaExceeded


class ProjectStore:
    """Projects that have a stored policy."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    def put(self, name: str, policy: ProjectPolicy, actor: str) -> ProjectSettings:
        """Create a project or replace its policy.

        A policy with credentials=None keeps the stored ones: otherwise a change of a quota could remove them, and the
        project's jobs would use the rights of the nodes.
        """
        while True:
            try:
                with Session(self._engine, expire_on_commit=False) as session, session.begin():
                    return self._put(session, name, policy, actor)
            except IntegrityError:  # created concurrently
                continue

    def _put(self, session: Session, name: str, policy: ProjectPolicy, actor: str) -> ProjectSettings:
        now = time.time()
        found = session.get(ProjectSettings, name, with_for_update=True)
        outcome = "created" if found is None else "updated"
        if policy.credentials is None:
            policy = policy.model_copy(update={"credentials": policy_of(found).credentials})
        if found is None:
            found = ProjectSettings(name=name, created_at=now)
            session.add(found)
        found.policy = policy.model_dump(mode="json", exclude_none=True)
        found.changed_at, found.changed_by = now, actor
        record_change(session, actor, "project.put", name, name, outcome)
        return found

    def get(self, name: str, visible: str | None = None) -> ProjectSettings:
        """Return a project. `visible`: the caller's project, or None for all.

        Raises NotFound if the project has no stored policy or is not visible to the caller.
        """
        with Session(self._reading, expire_on_commit=False) as session:
            found = session.get(ProjectSettings, name)
        if found is None or visible not in (None, name):
            raise NotFound(f"project {name!r} does not exist or has no policy")
        return found

    def list(self, visible: str | None = None) -> Sequence[ProjectSettings]:
        """Return the projects, sorted by name. `visible`: the caller's project, or None for all."""
        query = select(ProjectSettings).order_by(ProjectSettings.name)
        if visible is not None:
            query = query.where(ProjectSettings.name == visible)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def policies(self) -> dict[str, ProjectPolicy]:
        """Return the stored policies by project."""
        return {project.name: policy_of(project) for project in self.list()}

    def policy(self, name: str) -> ProjectPolicy:
        """Return a project's policy, or the default policy."""
        with Session(self._reading) as session:
            return policy_of(session.get(ProjectSettings, name))

    def check_priority(self, name: str, priority: int) -> None:
        """Raise QuotaExceeded for a job priority above the project's maximum."""
        limit = self.policy(name).max_priority
        if limit is not None and priority > limit:
            message = f"priority={priority}: must be at most {limit} in project {name}; lower it"
            raise QuotaExceeded(message, field="priority", limit=limit)


def policy_of(project: ProjectSettings | None) -> ProjectPolicy:
    """Return a project's policy, or the default policy. Ignores fields added by newer versions."""
    stored = project.policy if project is not None else {}
    return ProjectPolicy(**{name: value for name, value in stored.items() if name in ProjectPolicy.model_fields})


def locked_policy(session: Session, name: str) -> ProjectPolicy:
    """Return a project's policy, locked until the end of the transaction, so that quota checks run one at a time."""
    return policy_of(session.get(ProjectSettings, name, with_for_update=True))
