"""An in-memory fake of Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.serving.serve_api import ServeApplication
from service.web.errors import ClusterUnavailable


class FakeServe:
    """Stores the declared applications and adds a field, as Serve does."""

    def __init__(self) -> None:
        self.apps: dict[str, ServeApplication] = {}
        self.puts, self.unreachable, self.status = 0, False, "RUNNING"
        self.errors: dict[str, str] = {}
        self.replicas = 1

    def applications(self) -> dict[str, ServeApplication]:
        if self.unreachable:
            raise ClusterUnavailable("Ray Serve does not respond")
        return {name: app._replace(status=self.status, replicas=self.replicas) for name, app in self.apps.items()}

    def load_errors(self, name: str) -> Mapping[str, str]:
        return self.errors

    def put(self, applications: Sequence[Mapping[str, Any]]) -> None:
        self.puts += 1
        self.apps = {
            app["name"]: ServeApplication("RUNNING", "", {**app, "external": False}, 1) for app in applications
        }

    def deployed(self, name: str) -> Any:
        return self.apps[f"amd-{name}"].config["deployments"][0]
