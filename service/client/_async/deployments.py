"""Methods for deployments: `client.deployments`."""

from __future__ import annotations

import asyncio
import math
import time

from service.client._async.requests import POLL_INTERVAL_S, AsyncApiMethods
from service.client.errors import NoAnswer
from service.client.messages import present
from service.serving.schemas import (
    DeploymentList,
    DeploymentRequest,
    DeploymentView,
    DriftView,
    RevisionList,
    RevisionView,
)


class AsyncDeployments(AsyncApiMethods):
    _resource = ("deployments",)

    async def put(self, name: str, request: DeploymentRequest, etag: str | None = None) -> DeploymentView:
        """Create or update a deployment; it serves requests once its state is `healthy`.

        With `etag`, the deployment changes only if its settings still have this ETag; otherwise raises ApiError with
        the code `precondition_failed`.
        """
        return await self._request("PUT", DeploymentView, name, body=request, headers=present({"If-Match": etag}))

    async def get(self, name: str) -> DeploymentView:
        return await self._request("GET", DeploymentView, name)

    async def revisions(self, name: str) -> list[RevisionView]:
        """Return the deployment's revisions, newest first. Each change of its settings adds one."""
        return (await self._request("GET", RevisionList, name, "revisions")).items

    async def rollback(self, name: str, revision: int, etag: str | None = None) -> DeploymentView:
        """Restore the settings of an earlier revision. `etag` has the same effect as for `put`."""
        options = {"body": {"revision": revision}, "headers": present({"If-Match": etag}), "repeatable": True}
        return await self._request("POST", DeploymentView, name, "rollback", **options)

    async def list(self, project: str | None = None) -> list[DeploymentView]:
        return (await self._request("GET", DeploymentList, query={"project": project})).items

    async def delete(self, name: str) -> None:
        """Delete a deployment. Requests in progress are completed; the encoder is kept."""
        await self._send("DELETE", name)

    async def drift(self, name: str) -> DriftView:
        """Compare the candidate's embeddings with those of the deployed encoder."""
        return await self._request("GET", DriftView, name, "drift")

    async def wait(self, name: str, timeout_s: float | None = None) -> DeploymentView:
        """Wait until a deployment is healthy or has failed. Raises NoAnswer after the timeout."""
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            found = await self.get(name)
            if found.state in ("healthy", "failed"):
                return found
            if time.monotonic() > until:
                reason = found.message or "no reason reported"
                raise NoAnswer(f"{name} is still {found.state} after {timeout_s:g} s: {reason}")
            await asyncio.sleep(POLL_INTERVAL_S)
