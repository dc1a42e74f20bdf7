"""Ray Serve's REST API on Ray's dashboard, where the control plane tells which applications shall run.

One request names them all, so what is left out is taken down. Knows nothing of deployments in the database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx

from service.web.errors import ClusterUnavailable

TIMEOUT_S = 30.0


class Running(NamedTuple):
    """What Serve says of an application."""

    status: str
    """DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED, DELETING, NOT_STARTED."""
    message: str
    config: Mapping[str, Any]
    """As it was last told."""
    replicas: int
    """That take requests."""


class Serve(Protocol):
    """All may raise ClusterUnavailable."""

    def applications(self) -> dict[str, Running]: ...

    def put(self, applications: Sequence[Mapping[str, Any]]) -> None:
        """These and no others shall run."""


class ServeApi:
    def __init__(self, dashboard: str, token_file: Path | None, host: str, port: int) -> None:
        """`host`, `port`: where Serve listens once the first application starts it."""
        self._dashboard, self._token_file = dashboard.rstrip("/"), token_file
        self._start = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": host, "port": port},
        }

    def applications(self) -> dict[str, Running]:
        found = self._ask("GET").json().get("applications") or {}
        return {name: _running(details) for name, details in found.items()}

    def put(self, applications: Sequence[Mapping[str, Any]]) -> None:
        self._ask("PUT", {**self._start, "applications": list(applications)})

    def _ask(self, method: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        token = self._token_file.read_text().strip() if self._token_file is not None else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = httpx.request(
                method, f"{self._dashboard}/api/serve/applications/", json=body, headers=headers, timeout=TIMEOUT_S
            )
            return answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            said = error.response.text.strip().splitlines()
            raise ClusterUnavailable(
                f"Ray Serve at {self._dashboard} answers {error.response.status_code}: {said[-1][:300] if said else ''}"
            ) from None
        except (httpx.HTTPError, OSError) as error:
            raise ClusterUnavailable(
                f"Ray Serve at {self._dashboard} does not answer: {error or type(error).__name__}"
            ) from None


def _running(details: Mapping[str, Any]) -> Running:
    parts = (details.get("deployments") or {}).values()
    messages = [details.get("message") or "", *(part.get("message") or "" for part in parts)]
    replicas = [replica["state"] for part in parts for replica in part.get("replicas") or []]
    return Running(
        details.get("status", "NOT_STARTED"),
        next((message for message in messages if message), ""),
        details.get("deployed_app_config") or {},
        replicas.count("RUNNING"),
    )
