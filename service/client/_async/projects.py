"""Methods for projects, their usage, changes and events: `client.projects`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime

from service.client._async.requests import AsyncApiMethods
from service.projects.schemas import (
    ActivityPage,
    ActivityView,
    AuditPage,
    AuditView,
    ProjectList,
    ProjectPolicy,
    ProjectView,
    UsageGroup,
    UsageList,
)


class AsyncProjects(AsyncApiMethods):
    async def list(self) -> list[ProjectView]:
        """List the projects that have a policy."""
        return (await self._request("GET", ProjectList, "projects")).items

    async def get(self, name: str) -> ProjectView:
        return await self._request("GET", ProjectView, "projects", name)

    async def put(self, name: str, policy: ProjectPolicy) -> ProjectView:
        """Create a project, or replace its policy."""
        return await self._request("PUT", ProjectView, "projects", name, body=policy)

    async def usage(
        self,
        by: UsageGroup = "project",
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        project: str | None = None,
        limit: int | None = None,
    ) -> UsageList:
        """Sum up the hours for which jobs reserved resources. Default period: the current month (UTC)."""
        query = {"by": by, "since": _text(since), "until": _text(until), "project": project, "limit": limit}
        return await self._request("GET", UsageList, "usage", query=query)

    def changes(
        self,
        *,
        project: str | None = None,
        target: str | None = None,
        action: str | None = None,
        actor: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> AsyncIterator[AuditView]:
        """Iterate over changes made by users, newest first, fetching pages as needed.

        `action`: kind of the object and verb, such as `job.cancel`, or only the kind.
        """
        query = {"target": target, "action": action, "actor": actor, "project": project}
        query |= {"since": _text(since), "until": _text(until)}
        return self._pages(AuditPage, "audit", query=query)

    def events(
        self, *, types: Sequence[str] = (), since: datetime | None = None, project: str | None = None
    ) -> AsyncIterator[ActivityView]:
        """Iterate over events of jobs and changes to deployments, aliases and encoders, newest first.

        `types`: types such as `job.failed`, or kinds such as `job`. Pages are fetched as needed.
        """
        query = {"type": list(types) or None, "since": _text(since), "project": project}
        return self._pages(ActivityPage, "events", query=query)


def _text(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
