"""Client that declares applications through Ray Serve's REST API on the Ray dashboard.

One request declares all applications; Serve removes those that it does not list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx

from service.serving.protocol import unpack
from service.web.errors import ClusterUnavailable

TIMEOUT_S = 30.0
_ERROR_LINE = re.compile(r"^[A-Za-z_.]*(Error|Exception): ", re.MULTILINE)
STATE_TIMEOUT_S = 3.0
HOLDING = frozenset({"RUNNING", "UPDATING", "RECOVERING", "STOPPING"})  # states of replicas that hold resources


class ServeApplication(NamedTuple):
    """An application, as reported by Serve."""

    status: str
    """One of DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED, DELETING, NOT_STARTED."""
    message: str
    config: Mapping[str, Any]
    """Configuration that was last deployed."""
    replicas: int
    """Number of replicas that are running or shutting down and therefore hold resources."""


class ServeClient(Protocol):
    """Manages Serve's applications. Every method may raise ClusterUnavailable."""

    def applications(self) -> dict[str, ServeApplication]: ...

    def put(self, applications: Sequence[Mapping[str, Any]]) -> None:
        """Declare the applications to run; Serve removes all others."""

    def load_errors(self, name: str) -> Mapping[str, str]:
        """Return the error for each slot whose encoder could not be loaded, as reported by one replica."""


class ServeApi:
    """ServeClient that uses the dashboard's REST API."""

    def __init__(self, dashboard: str, token_file: Path | None, host: str, port: int, url: str) -> None:
        """`host`, `port`: address that Serve listens on once an application has been declared; `url`: URL of Serve."""
        self._url = url.rstrip("/")
        self._dashboard, self._token_file = dashboard.rstrip("/"), token_file
        self._start = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": host, "port": port},
        }

    def applications(self) -> dict[str, ServeApplication]:
        applications_by_name = self._request("GET").json().get("applications") or {}
        return {name: _parse_application(details) for name, details in applications_by_name.items()}

    def put(self, applications: Sequence[Mapping[str, Any]]) -> None:
        self._request("PUT", {**self._start, "applications": list(applications)})

    def load_errors(self, name: str) -> Mapping[str, str]:
        try:
            response = httpx.get(f"{self._url}/{name}", timeout=STATE_TIMEOUT_S, trust_env=False)
            errors: Mapping[str, str] = unpack(response.content).get("trouble") or {}
            return errors
        except (httpx.HTTPError, ValueError) as error:
            raise ClusterUnavailable(f"{name}: no replica reports its state: {error or type(error).__name__}") from None

    def _request(self, method: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        token = self._token_file.read_text().strip() if self._token_file is not None else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            response = httpx.request(
                method, f"{self._dashboard}/api/serve/applications/", json=body, headers=headers, timeout=TIMEOUT_S
            )
            return response.raise_for_status()
        except httpx.HTTPStatusError as error:
            lines = error.response.text.strip().splitlines()
            raise ClusterUnavailable(
                f"Ray Serve at {self._dashboard} returned {error.response.status_code}: "
                f"{lines[-1][:300] if lines else ''}"
            ) from None
        except (httpx.HTTPError, OSError) as error:
            raise ClusterUnavailable(
                f"Ray Serve at {self._dashboard} is not responding: {error or type(error).__name__}"
            ) from None


def _parse_application(details: Mapping[str, Any]) -> ServeApplication:
    parts = (details.get("deployments") or {}).values()
    messages = [*(part.get("message") or "" for part in parts), details.get("message") or ""]
    replicas = [replica["state"] for part in parts for replica in part.get("replicas") or []]
    holding = sum(state in HOLDING for state in replicas)
    return ServeApplication(
        details.get("status", "NOT_STARTED"),
        next((_cause(message) for message in messages if message), ""),
        details.get("deployed_app_config") or {},
        holding,
    )


def _cause(message: str) -> str:
    """Return the error at the end of a traceback in a Serve message, or the message if it has no traceback."""
    errors = [match.start() for match in _ERROR_LINE.finditer(message)]
    return message[errors[-1] :].strip() if errors else message
