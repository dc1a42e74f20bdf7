# Generated from service/client/_async/deployments.py by `python -m tests.support.blocking_client`; do not edit.
"""Methods for deployments: `client.deployments`."""

from __future__ import annotations

import math
import time

from service.client._sync.requests import POLL_INTERVAL_S, ApiMethods
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


class Deployments(ApiMethods):
    _resource = ("deployments",)

    def put(self, name: str, request: DeploymentRequest, etag: str | None = None) -> DeploymentView:
        """Create or update a deployment; it serves requests once its state is `healthy`.

        With `etag`, the deployment changes only if its settings still have this ETag; otherwise raises ApiError with
        the code `precondition_failed`.
        """
        return self._request("PUT", DeploymentView, name, body=request, headers=present({"If-Match": etag}))

    def get(self, name: str) -> DeploymentView:
        return self._request("GET", DeploymentView, name)

    def revisions(self, name: str) -> list[RevisionView]:
        """Return the deployment's revisions, newest first. Each change of its settings adds one."""
        return (self._request("GET", RevisionList, name, "revisions")).items

    def rollback(self, name: str, revision: int, etag: str | None = None) -> DeploymentView:
        """Restore the settings of an earlier revision. `etag` has the same effect as for `put`."""
        options = {"body": {"revision": revision}, "headers": present({"If-Match": etag}), "repeatable": True}
        return self._request("POST", DeploymentView, name, "rollback", **options)

    def list(self, project: str | None = None) -> list[DeploymentView]:
        return (self._request("GET", DeploymentList, query={"project": project})).items

    def delete(self, name: str) -> None:
        """Delete a deployment. Requests in progress are completed; the encoder is kept."""
        self._send("DELETE", name)

    def drift(self, name: str) -> DriftView:
        """Compare the candidate's embeddings with those of the deployed encoder."""
        return self._request("GET", DriftView, name, "drift")

    def wait(self, name: str, timeout_s: float | None = None) -> DeploymentView:
        """Wait until a deployment is healthy or has failed. Raises NoAnswer after the timeout."""
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            found = self.get(name)
            if found.state in ("healthy", "failed"):
                return found
            if time.monotonic() > until:
                reason = found.message or "no reason reported"
                raise NoAnswer(f"{name} is still {found.state} after {timeout_s:g} s: {reason}")
            time.sleep(POLL_INTERVAL_S)
