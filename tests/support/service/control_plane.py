"""A real control plane in its own process, which can be killed and restarted on the same data."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from service.stack.ports import free_ports

READY_S = 120


class ControlPlane:
    """A `python -m service` process with its own data directory and port."""

    def __init__(self, data: Path, dashboard: str, **environment: str) -> None:
        self.data, self.port = data, free_ports(1)[0]
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "AMD_DATA_DIR": str(data),
            "AMD_STORAGE": str(data / "root"),
            "AMD_RAY_DASHBOARD": dashboard,
            "AMD_PORT": str(self.port),
            "AMD_RECONCILE_S": "0.3",
            "AMD_RAY_PYTHON": sys.executable,
            **environment,
        }
        data.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, until_ready: bool = True) -> ControlPlane:
        with (self.data / "control-plane.log").open("ab") as log:
            command = [sys.executable, "-m", "service"]
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        if until_ready:
            wait_for(self._responds, READY_S)
        return self

    def _responds(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.data / "control-plane.log").read_text()[-4000:]
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def key(self) -> str:
        return (self.data / "admin-key").read_text().strip()

    def request(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        response = httpx.request(method, f"{self.url}/v1{path}", headers=headers, timeout=30, **options)
        assert response.status_code < 400, response.text
        return response.json() if response.content else None

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}/v1{path}", headers={"Authorization": f"Bearer {self.key}"}, timeout=60)

    def submit(self, **body: Any) -> str:
        return str(self.request("POST", "/jobs", json=body)["id"])

    def job(self, job_id: str) -> Any:
        return self.request("GET", f"/jobs/{job_id}")

    def wait_until(self, job_id: str, *states: str, seconds: float = 300) -> Any:
        try:
            wait_for(lambda: self.job(job_id)["state"] in states, seconds)
        except AssertionError:
            log = self.get(f"/jobs/{job_id}/logs").text
            raise AssertionError(f"{self.job(job_id)}\n{log[-3000:]}") from None
        return self.job(job_id)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Poll a condition until it is true. Raises AssertionError after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not become true in time"
        time.sleep(0.1)
