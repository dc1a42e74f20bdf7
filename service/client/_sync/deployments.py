# Generated from service/client/_async/deployments.py by `python -m tests.support.blocking_client`; do not edit.
"""Methods for deployments: `client.deployments`."""

from __future__ import annotations

import math
import time

from service.client._sync.requests import POLL_INTERVAL_S, ApiMethods
from service.client.errors import NoAnswer
from service.client.messages import api_path, fields_of, present
from service.serving.schemas import (
    DeploymentList,
    DeploymentRequest,
    DeploymentView,
    DriftView,
    RevisionList,
    RevisionView,
)


class Deployments(ApiMethods):
    def put(self, name: str, request: DeploymentRequest, etag: str | None = None) -> DeploymentView:
        """Create or update a deployment; it serves requests once its state is `healthy`.

        With `etag`, the deployment changes only if its settings still have this ETag; otherwise raises ApiError with
        the code `precondition_failed`.
        """
        path, headers = api_path("deployments", name), present({"If-Match": etag})
        return self._request("PUT", path, DeploymentView, body=fields_of(request), headers=headers)

    def get(self, name: str) -> DeploymentView:
        return self._request("GET", api_path("deployments", name), DeploymentView)

    def revisions(self, name: str) -> list[RevisionView]:
        """Return the deployment's revisions, newest first. Each change of its settings adds one."""
        return (self._request("GET", api_path("deployments", name, "revisions"), RevisionList)).items

    def rollback(self, name: str, revision: int, etag: str | None = None) -> DeploymentView:
        """Restore the settings of an earlier revision. `etag` has the same effect as for `put`."""
        path, headers = api_path("deployments", name, "rollback"), present({"If-Match": etag})
        body, repeatable = {"revision": revision}, etag is None
        return self._request("POST", path, DeploymentView, body=body, headers=headers, repeatable=repeatable)

    def list(self, project: str | None = None) -> list[DeploymentView]:
        path = api_path("deployments")
        return (self._request("GET", path, DeploymentList, query={"project": project})).items

    def delete(self, name: str) -> None:
        """Delete a deployment. Requests in progress are completed; the encoder is kept."""
        self._send("DELETE", api_path("deployments", name))

    def drift(self, name: str) -> DriftView:
        """Compare the candidate's embeddings with those of the deployed encoder."""
        return self._request("GET", api_path("deployments", name, "drift"), DriftView)

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
